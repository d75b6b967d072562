"""A prompt as a chat completion of vLLM, and what comes back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kd.remote import Fault, messages
from kd.rollout.engine import Policy, Sampling
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


def _spread(seed: int) -> int:
    """Response k of a request is drawn with seed + k, so neighbours would share responses."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "big")
