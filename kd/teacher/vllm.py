"""A vLLM server as the teacher: top-k log-probs of responses given token by token, with images.

Shape legend: N response tokens, K the top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from kd.remote import PROBE, Fault, check_prompt, find_card, messages, request_json
from kd.teacher.engine import PROBE_TIMEOUT_S, Served, Session, TopKConfig, check_lengths
from kd.teacher.payload import ABSENT, Payload, TopK
from kd.types import Response, UserError

SMALLEST_TAIL = 1e-7
"""The tail is 1 minus a sum of float32 probabilities: less than this is rounding."""


@dataclass
class VllmServe(TopKConfig):
    """vLLM servers (scripts/vllm_server.sh MODEL PORT --enable-scale-out --max-logprobs K)."""

    model: str | None = None
    """The name it is served under; None: the first that the server lists."""

    def validate(self, key: str, temperature: float) -> None:
        """Also refuse a temperature that its log-probs cannot have."""
        self.validate_top_k(key)
        if self.tail and temperature != 1:
            raise UserError(
                f"vLLM's log-probs are of temperature 1, and with the tail as a bucket they cannot "
                f"be changed to {temperature:g}: set loss.temperature=1, {key}.tail=false (which "
                "renormalises the k), or teacher/engine=kd"
            )

    def temperature_of(self, asked: float) -> float:
        """Always 1."""
        return 1.0

    def build(self, session: Session) -> VllmTeacherEngine:
        """See the base class."""
        return VllmTeacherEngine(self, session)


class VllmTeacherEngine:
    """A row at a time: `/render` gives the prompt as the server reads it, `/generate` scores it."""

    max_rows = 1

    def __init__(self, config: VllmServe, session: Session) -> None:
        self.config, self.session = config, session
        self._names: dict[str, str] = {}

    async def handshake(self, http: httpx.AsyncClient, url: str) -> None:
        """See `TeacherEngine`."""
        # One token is generated after the response.
        room = self.session.max_length + 1
        models = await request_json(http, f"{url}/v1/models", None, PROBE_TIMEOUT_S)
        name = find_card(url, models, self.config.model, room)["id"]
        self._names[url] = name
        ours = self.session.processor.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        request = {"model": name, "prompt": PROBE, "add_special_tokens": False}
        reply = await request_json(http, f"{url}/tokenize", request, PROBE_TIMEOUT_S)
        check_prompt(url, ours, reply.get("tokens"))
        try:
            await self._log_probs(http, url, {"token_ids": ours})
        except UserError as error:
            if "(404)" in str(error):
                raise UserError(
                    f"{url} does not take tokens: start vLLM 0.32 or newer with --enable-scale-out"
                ) from None
            raise UserError(
                f"{url} does not serve {self.config.k} log-probs per token: start it with "
                f"--max-logprobs {self.config.k}, or lower teacher.engine.k\n({error})"
            ) from None

    async def served(self, http: httpx.AsyncClient, url: str) -> Served:
        """See `TeacherEngine`."""
        return Served(self.session.vocab, [], None, {"served": self._names[url]})

    async def ask(
        self, http: httpx.AsyncClient, url: str, responses: list[Response]
    ) -> list[Payload]:
        """See `TeacherEngine`."""
        payloads = [await self._ask(http, url, response) for response in responses]
        check_lengths(url, responses, payloads)
        return payloads

    async def _ask(self, http: httpx.AsyncClient, url: str, response: Response) -> Payload:
        request = {
            "model": self._names[url],
            "messages": messages(response.sample),
            "add_generation_prompt": True,
            "chat_template_kwargs": self.session.chat_template_kwargs,
        }
        path, timeout_s = "/v1/chat/completions/render", self.session.timeout_s
        rendered = await request_json(http, url + path, request, timeout_s)
        check_prompt(url, response.prompt_ids, rendered.get("token_ids"))
        rendered["token_ids"] = [*response.prompt_ids, *response.response_ids]
        found = await self._log_probs(http, url, rendered)
        rows = found[len(response.prompt_ids) :]
        try:
            k, vocab = self.config.k, self.session.vocab
            return read_log_probs(rows, response.response_ids, k=k, vocab=vocab)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Fault(f"{url} sends no log-probs: {error!r}", answered=True) from None

    async def _log_probs(
        self, http: httpx.AsyncClient, url: str, tokens: dict[str, Any]
    ) -> list[dict[str, Any]]:
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self.config.k}
        request = {**tokens, "model": self._names[url], "sampling_params": sampling}
        path, timeout_s = "/inference/v1/generate", self.session.timeout_s
        reply = await request_json(http, url + path, request, timeout_s)
        found = reply.get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(tokens["token_ids"]):
            raise Fault(f"{url} sends no log-probs of the prompt", answered=True)
        return found


def read_log_probs(
    rows: list[dict[str, Any]], response_ids: list[int], *, k: int, vocab: int
) -> TopK:
    """Of the server's rows `{token id: {"logprob": …, "rank": …}}`, one per response token.

    Raises KeyError, TypeError or ValueError where they are something else.
    """
    ids, logp, own, tails = [], [], [], []
    for row, token in zip(rows, response_ids, strict=True):
        values = {int(i): float(entry["logprob"]) for i, entry in row.items()}
        if len(values) < k:
            raise ValueError(f"{len(values)} log-probs instead of {k}")
        # Entries that pad a larger head than the student's count with the tail.
        values = {i: x for i, x in values.items() if i < vocab}
        best = sorted(values, key=lambda i: -values[i])[:k]
        missing = k - len(best)
        ids.append([*best, *[token] * missing])
        logp.append([*(values[i] for i in best), *[ABSENT] * missing])
        own.append(values[token])
        tails.append(_tail(values, vocab))
    return TopK(torch.tensor(ids), torch.tensor(logp), torch.tensor(own), torch.tensor(tails))


def _tail(values: dict[int, float], vocab: int) -> float:
    if len(values) == vocab:  # none is left: the student's tail is empty, too
        return ABSENT
    mass = math.fsum(math.exp(x) for x in values.values())
    return math.log(max(1 - mass, SMALLEST_TAIL))
