"""A prompt as a chat completion of vLLM, and what comes back."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kd.rollout.engine import Policy, Sampling
from kd.rollout.http import Fault
from kd.rollout.vllm_servers import Held
from kd.types import Sample, UserError


@dataclass
class Response:
    """The ids sampled, with the stop id that ended them, if one did."""

    ids: list[int]
    finished: bool


@dataclass
class Answer:
    """To one request."""

    held: Held
    prompt_ids: list[int]
    """As the server reads the prompt, image placeholders expanded."""
    responses: list[Response]


def chat_request(
    policy: Policy, sample: Sample, n: int, sampling: Sampling, seed: int
) -> dict[str, Any]:
    """Asks for `n` responses; greedy ones are all alike, and one is asked for."""
    return {
        "messages": messages(sample),
        "add_generation_prompt": True,
        "chat_template_kwargs": policy.chat_template_kwargs,
        "return_token_ids": True,
        "n": n if sampling.temperature > 0 else 1,
        "seed": _spread(seed),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # Or else what the served folder's generation_config.json says.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": policy.stop_ids,
        "logit_bias": {str(token): -100.0 for token in policy.forbidden_ids},
    }


def read_answer(held: Held, reply: dict[str, Any], request: dict[str, Any]) -> Answer:
    """Raises Fault for a reply that is not as asked for, UserError for a stop id not ours."""
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        responses = [_response(held.url, choice, request["stop_token_ids"]) for choice in choices]
        answer = Answer(held, list(reply["prompt_token_ids"]), responses)
    except (KeyError, TypeError) as error:
        raise Fault(f"{held.url} answers something else than a chat completion: {error}") from None
    if len(responses) != request["n"]:
        raise Fault(f"{held.url} answers with {len(responses)} responses, not {request['n']}")
    return answer


def _response(url: str, choice: dict[str, Any], stop_ids: list[int]) -> Response:
    reason, ids = choice["finish_reason"], list(choice["token_ids"])
    if reason not in ("stop", "length"):  # such as abort
        raise Fault(f"{url} has ended a response by {reason!r}")
    if ids and (reason == "stop") != (ids[-1] in stop_ids):
        raise UserError(
            f"{url} has ended a response with token {ids[-1]} ({reason}), where the run's stop "
            f"ids are {stop_ids}"
        )
    return Response(ids, reason == "stop" and ids != [])


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The messages of `sample`, with its images in their places as data URIs."""
    images = iter(sample.images)
    return [
        {**message, "content": _content(message["content"], images)} for message in sample.messages
    ]


def _content(content: str | list[dict[str, Any]], images: Iterator[Image.Image]) -> Any:
    if isinstance(content, str):
        return content
    return [_image_part(next(images)) if part["type"] == "image" else part for part in content]


def _image_part(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    # As the processor converts it: the server would put what is transparent on white.
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _spread(seed: int) -> int:
    """Response k of a request is drawn with seed + k, so neighbours would share responses."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "big")
