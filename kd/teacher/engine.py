"""What serves a remote teacher: the interface, and `kd.serve` as the first of its kinds.

Shape legend: N response tokens, D hidden, V vocabulary, K the top-k.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from transformers import ProcessorMixin

from kd.model import rendering_digest, tokenizer_digest
from kd.remote import Fault, messages, request_bytes, request_json
from kd.teacher.base import Head
from kd.teacher.payload import Payload, TopK, tensors
from kd.teacher.wire import Info, prompt_digest, unpack_head, unpack_reply
from kd.types import Response, UserError

PROBE_TIMEOUT_S = 60.0
TOKEN_VARIABLE = "KD_SERVE_TOKEN"


@dataclass
class Session:
    """What a run asks of the servers."""

    processor: ProcessorMixin
    """As the run renders the teacher's prompts."""
    chat_template_kwargs: dict[str, Any]
    vocab: int
    """Entries of the vocabulary that are compared, at most."""
    temperature: float
    max_length: int
    timeout_s: float


@dataclass
class Served:
    """What the servers have in common."""

    vocab: int
    """Entries of the teacher's distributions that are compared."""
    stop_ids: list[int]
    head: Head | None
    """None: what is served are log-probs."""
    identity: dict[str, str]
    """Of the weights that are served, and in which precision, as far as the server tells."""


class TeacherEngine(Protocol):
    """Asks servers of one kind; for one event loop."""

    @property
    def max_rows(self) -> int:
        """Rows of one request, at most; known after the handshake."""
        ...

    async def handshake(self, http: httpx.AsyncClient, url: str) -> None:
        """Raises UserError at a server that is of no use for the session, Fault if it is away."""
        ...

    async def served(self, http: httpx.AsyncClient, url: str) -> Served:
        """What is served; after the handshakes with all servers."""
        ...

    async def ask(
        self, http: httpx.AsyncClient, url: str, responses: list[Response]
    ) -> list[Payload]:
        """One payload per response. Raises Fault for anything but a good answer."""
        ...


@dataclass
class TeacherEngineConfig:
    """Base of the `teacher/engine` options."""

    def validate(self, key: str, temperature: float) -> None:
        """Refuse values out of range."""

    @property
    def is_dense(self) -> bool:
        """Whether it serves whole distributions."""
        return False

    @property
    def keeps_tail(self) -> bool:
        """Whether the mass outside the top-k is a bucket of its own."""
        return True

    @property
    def any_temperature(self) -> bool:
        """Whether what is served can be used at any temperature of the loss."""
        return self.is_dense or not self.keeps_tail

    def temperature_of(self, asked: float) -> float:
        """Of the log-probs that are served when `asked` is wanted."""
        return asked

    def build(self, session: Session) -> TeacherEngine:
        """The engine for one run."""
        raise NotImplementedError


@dataclass
class TopKConfig(TeacherEngineConfig):
    """Fields of engines that serve top-k log-probs."""

    k: int = 128
    """The likeliest tokens that are sent, with their log-probs."""
    tail: bool = True
    """The mass of all other tokens is a bucket of its own. False: the k are renormalised, for the
    teacher and the student, which then learns nothing about the others."""

    @property
    def keeps_tail(self) -> bool:
        """See the base class."""
        return self.tail

    def validate_top_k(self, key: str) -> None:
        """Refuse a support on which nothing can be learnt."""
        if self.k < 1:
            raise UserError(f"{key}.k={self.k}: must be at least 1")
        if self.k == 1 and not self.tail:
            raise UserError(
                f"{key}.k=1 with {key}.tail=false leaves one outcome, whose divergence is always "
                "0: keep the tail, or raise k"
            )


@dataclass
class KdServe(TopKConfig):
    """Servers of this project: `python -m kd.serve`.

    The environment variable KD_SERVE_TOKEN holds the token of servers that ask for one.
    """

    targets: str = "hidden"
    """hidden: hidden states, exact, with the head fetched once; topk: k log-probs and the tail."""

    def validate(self, key: str, temperature: float) -> None:
        """Refuse values out of range."""
        if self.targets not in ("hidden", "topk"):
            raise UserError(f"{key}.targets={self.targets}: use hidden or topk")
        if self.targets == "topk":
            self.validate_top_k(key)

    @property
    def is_dense(self) -> bool:
        """See the base class."""
        return self.targets == "hidden"

    @property
    def keeps_tail(self) -> bool:
        """See the base class."""
        return self.is_dense or self.tail

    def build(self, session: Session) -> KdEngine:
        """See the base class."""
        return KdEngine(self, session)


class KdEngine:
    """Asks `kd.serve`."""

    def __init__(self, config: KdServe, session: Session) -> None:
        self.config, self.session = config, session
        self.info: Info | None = None
        self._teacher = b""

    @property
    def max_rows(self) -> int:
        """See `TeacherEngine`."""
        assert self.info is not None
        return self.info.max_rows

    async def handshake(self, http: httpx.AsyncClient, url: str) -> None:
        """See `TeacherEngine`. All servers must serve the same."""
        self._authorise(http)
        reply = await request_json(http, f"{url}/v1/info", None, PROBE_TIMEOUT_S)
        try:
            info = Info.read(reply)
        except ValueError as error:
            raise UserError(f"{url} is no server of kd.serve: {error}") from None
        self._check_info(url, info)
        if self.info is not None and info != self.info:
            raise UserError(
                f"{url} serves {info.model} ({info.dtype}), another server {self.info.model} "
                f"({self.info.dtype}), or with other settings: start all of them alike"
            )
        self.info = info

    def _authorise(self, http: httpx.AsyncClient) -> None:
        token = os.environ.get(TOKEN_VARIABLE)  # not a setting: those are written down and logged
        if token:
            http.headers["Authorization"] = f"Bearer {token}"

    def _check_info(self, url: str, info: Info) -> None:
        session = self.session
        if info.tokenizer != tokenizer_digest(session.processor):
            raise UserError(
                f"{url} serves {info.model}, whose tokenizer is not that of teacher.name: name "
                "the teacher that is served"
            )
        if info.rendering != rendering_digest(session.processor, session.chat_template_kwargs):
            raise UserError(
                f"{url} renders prompts otherwise than this run: give teacher.processor the "
                "settings that the server was started with"
            )
        if info.max_length < session.max_length:
            raise UserError(
                f"{url} has room for {info.max_length} tokens, the run needs {session.max_length}: "
                f"start it with serve.max_length={session.max_length}"
            )
        if not self.config.is_dense and self.config.k > info.max_top_k:
            raise UserError(
                f"{url} serves at most {info.max_top_k} log-probs, teacher.engine.k is "
                f"{self.config.k}: lower it, or start it with serve.max_top_k={self.config.k}"
            )

    async def served(self, http: httpx.AsyncClient, url: str) -> Served:
        """See `TeacherEngine`."""
        assert self.info is not None
        self._teacher = self.info.digest
        identity = {"weights": self.info.weights, "compute_dtype": self.info.dtype}
        if not self.config.is_dense:
            return Served(self._vocab, self.info.stop_ids, None, identity)
        body = await request_bytes(http, f"{url}/v1/head", None, self.session.timeout_s)
        try:
            head = Head(*unpack_head(body))
        except ValueError as error:
            raise Fault(f"{url} sends no head: {error}", answered=True) from None
        shape = self.info.vocab_size, self.info.hidden_size
        if tuple(head.weight_VD.shape) != shape:
            raise Fault(f"{url} sends a head of another shape than it tells of", answered=True)
        return Served(self._vocab, self.info.stop_ids, head, identity)

    @property
    def _vocab(self) -> int:
        assert self.info is not None
        return min(self.session.vocab, self.info.vocab_size)

    async def ask(
        self, http: httpx.AsyncClient, url: str, responses: list[Response]
    ) -> list[Payload]:
        """See `TeacherEngine`."""
        rows = [{"messages": messages(r.sample), "response_ids": r.response_ids} for r in responses]
        request: dict[str, Any] = {"rows": rows, "kind": self.config.targets}
        if not self.config.is_dense:
            assert self.info is not None
            request |= {
                "k": self.config.k,
                "temperature": self.session.temperature,
                "vocab": self._vocab,
            }
        body = await request_bytes(http, f"{url}/v1/targets", request, self.session.timeout_s)
        try:
            reply = unpack_reply(body)
        except ValueError as error:
            raise Fault(f"{url} sends no targets: {error}", answered=True) from None
        if reply.teacher != self._teacher:
            raise UserError(
                f"{url} serves another teacher than at the start of this run: start it as it was, "
                "then the run with the same command"
            )
        check_lengths(url, responses, reply.payloads)
        for payload in reply.payloads:
            self._check(url, payload)
        for response, prompt in zip(responses, reply.prompts, strict=True):
            if prompt != prompt_digest(response.prompt_ids):
                raise UserError(
                    f"{url} reads another prompt than this run for row {response.sample.id}: serve "
                    "the teacher with the run's teacher.processor settings and software versions"
                )
        return reply.payloads

    def _check(self, url: str, payload: Payload) -> None:
        """Raises Fault where it is not what was asked for, or is no log-probs or hidden states."""
        assert self.info is not None
        n, k = len(payload), self.config.k
        if self.config.is_dense:
            shapes = {"hidden_ND": (n, self.info.hidden_size)}
        else:
            shapes = {"ids_NK": (n, k), "logp_NK": (n, k), "response_logp_N": (n,), "tail_N": (n,)}
        found = tensors(payload)
        if {name: tuple(x.shape) for name, x in found.items()} != shapes:
            raise Fault(f"{url} sends targets of another shape than asked for", answered=True)
        if not all(bool(x.isfinite().all()) for x in found.values()):
            raise Fault(f"{url} sends numbers that are not finite", answered=True)
        if n and isinstance(payload, TopK):
            first, last = payload.ids_NK.aminmax()
            if first < 0 or last >= self._vocab:
                raise Fault(f"{url} sends tokens beyond the {self._vocab} asked for", answered=True)


def check_lengths(url: str, responses: list[Response], payloads: list[Payload]) -> None:
    """Raises Fault where an answer is not about these responses."""
    asked = [len(response.response_ids) for response in responses]
    got = [len(payload) for payload in payloads]
    if asked != got:
        raise Fault(f"{url} answers for {got} tokens, asked for {asked}", answered=True)
