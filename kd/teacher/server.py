"""A teacher behind servers: asked ahead of time, and never waited for longer than need be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from transformers import AutoConfig, ProcessorMixin

from kd.model import PretrainedModel, ProcessorConfig
from kd.parallel import ParallelConfig, World
from kd.remote import Background, Pool, client
from kd.teacher.assemble import assemble
from kd.teacher.base import BaseTeacher, Head, TeacherConfig
from kd.teacher.engine import Served, Session, TeacherEngine, TeacherEngineConfig
from kd.teacher.payload import Payload
from kd.types import Batch, Response, TeacherTargets, UserError

HINT = "Start it again, then the run, with the same command: it goes on from its last checkpoint"


@dataclass
class ServerTeacherConfig(TeacherConfig):
    """A teacher behind one or several servers, which all serve the same."""

    name: str = "???"
    """The teacher's folder or hub name: its processor is read here, its weights are not."""
    revision: str | None = None
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    trust_remote_code: bool = False
    urls: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8100"])
    engine: TeacherEngineConfig = field(default_factory=TeacherEngineConfig)
    temperature: float = 1.0
    """Of the log-probs asked for: ${loss.temperature}."""
    max_length: int = 2048
    """Tokens that the servers must have room for: ${data.max_length}."""
    ahead: bool = True
    """Ask for the targets of the next step while this one is trained on."""
    rows_per_request: int = 4
    max_concurrency: int = 16
    """Requests under way, per rank."""
    timeout_s: float = 300.0
    """For a request."""
    retries: int = 3
    """Further tries of a request that a server fails at."""
    wait_s: float = 300.0
    """How long to wait when no server is of use, at the start and later, before the run ends."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        super().validate(key)
        self.processor.validate(key)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise UserError(f"{key}.urls={self.urls}: give one or more, each once")
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or url.endswith("/"):
                raise UserError(f"{key}.urls: {url} should look like http://127.0.0.1:8100")
        for name in ("rows_per_request", "max_concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"{key}.{name}={getattr(self, name)}: must be at least 1")
        if self.timeout_s <= 0 or self.wait_s < 0 or self.retries < 0:
            raise UserError(
                f"{key}: timeout_s={self.timeout_s}, wait_s={self.wait_s}, retries={self.retries}: "
                "give a positive timeout_s and the others 0 or more"
            )
        self.engine.validate(f"{key}.engine", self.temperature)

    @property
    def is_dense(self) -> bool:
        """See the base class."""
        return self.engine.is_dense

    @property
    def temperature_fixed(self) -> float | None:
        """See the base class."""
        if self.engine.any_temperature:
            return None
        return self.engine.temperature_of(self.temperature)

    @property
    def keeps_tail(self) -> bool:
        """See the base class."""
        return self.engine.keeps_tail

    @property
    def is_told_ahead(self) -> bool:
        """See the base class."""
        return self.ahead

    def head_numbers(self) -> int | None:
        """Of the head that is sent, and lies on the device; 0: none is.

        None: not known, as neither a folder nor the hub's local cache has the teacher's config.
        """
        if not self.is_dense:
            return 0
        try:
            config = AutoConfig.from_pretrained(
                self.name,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                local_files_only=True,
            )
        except (OSError, ValueError):
            return None
        text = config.get_text_config(decoder=True)
        return text.hidden_size * text.vocab_size

    def identity(self, parallel: ParallelConfig) -> dict[str, str]:
        """See the base class; the servers tell of their weights."""
        return {"name": self.name}

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin:
        """The teacher's, without its weights."""
        model = PretrainedModel(
            name=self.name,
            revision=self.revision,
            processor=self.processor,
            trust_remote_code=self.trust_remote_code,
        )
        return model.build_processor(corpus)

    def build_teacher(
        self,
        processor: ProcessorMixin | None,
        world: World,
        parallel: ParallelConfig,
        student_vocab: int,
    ) -> ServerTeacher:
        """Agree with the servers. Collective."""
        assert processor is not None
        session = Session(
            processor,
            self.processor.chat_template_kwargs,
            student_vocab,
            self.temperature,
            self.max_length,
            self.timeout_s,
        )
        return ServerTeacher(self, self.engine.build(session), world)


class ServerTeacher(BaseTeacher):
    """Asks for what is expected at once; `targets` waits for what is not there yet.

    A reply belongs to the rows of its request, whatever the order in which replies come.
    """

    def __init__(self, config: ServerTeacherConfig, engine: TeacherEngine, world: World) -> None:
        self.config, self.engine, self.world = config, engine, world
        self.pool = Pool(config.urls, config.retries, config.wait_s, HINT)
        self.background = Background()
        self.http = client(config.max_concurrency + len(config.urls))
        self._free = asyncio.Semaphore(config.max_concurrency)
        self._expected: dict[int, tuple[Batch, list[Future[list[Payload]]]]] = {}
        """By the identity of `responses`, which device copies share; the batch keeps it alive."""
        problem = None
        try:
            self.served = self.background.run(self._connect())
        except UserError as error:
            problem = str(error)
        try:
            world.agree(problem)
        except BaseException:
            self.close()
            raise
        self.head = None
        if self.served.head is not None:
            bias_V = self.served.head.bias_V
            self.head = Head(
                self.served.head.weight_VD.to(world.device),
                None if bias_V is None else bias_V.to(world.device),
            )
            self.served.head = None

    @property
    def identity(self) -> dict[str, str]:
        """See the base class."""
        return self.served.identity

    async def _connect(self) -> Served:
        for url in self.config.urls:  # one after the other: they are compared with each other
            # A pool of its own: this very server must answer.
            pool = Pool([url], self.config.retries, self.config.wait_s, HINT)
            await pool.call(lambda url: self.engine.handshake(self.http, url))
        return await self.pool.call(lambda url: self.engine.served(self.http, url))

    def expect(self, batches: list[Batch]) -> None:
        """Ask for what has not been asked for."""
        for batch in batches:
            if id(batch.responses) in self._expected:
                continue
            rows = [response for response in batch.responses if response.response_ids]
            size = min(self.config.rows_per_request, self.engine.max_rows)
            futures = [
                self.background.start(self._ask(rows[i : i + size]))
                for i in range(0, len(rows), size)
            ]
            self._expected[id(batch.responses)] = batch, futures

    async def _ask(self, responses: list[Response]) -> list[Payload]:
        async with self._free:
            return await self.pool.call(lambda url: self.engine.ask(self.http, url, responses))

    def targets(self, batch: Batch) -> TeacherTargets:
        """See `Teacher`. Raises UserError where the servers are gone for good."""
        self.expect([batch])
        _, futures = self._expected.pop(id(batch.responses))
        payloads = [payload for future in futures for payload in future.result()]
        return assemble(
            payloads,
            batch,
            head=self.head,
            matched=self.matched,
            vocab=self.served.vocab,
            temperature=self.config.engine.temperature_of(self.config.temperature),
            tail=self.config.keeps_tail,
        )

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """See `Teacher`."""
        return [eos_token_id, *(t for t in self.served.stop_ids if t != eos_token_id)]

    def close(self) -> None:
        """Drop what is under way."""
        self.background.close()
