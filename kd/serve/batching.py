"""Rows of several requests -> forwards. All of it lives in one event loop, first come first served.

Only the forward runs elsewhere: in one thread, which alone talks to the other ranks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kd.serve.metrics import Metrics
from kd.serve.model import Row, ServedModel
from kd.serve.schema import Refused
from kd.teacher.payload import Payload

LONGEST_REST_S = 30.0
RETRY_AFTER_S = 1
T = TypeVar("T")


class Job:
    """The rows of one request."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.answers: dict[int, Payload] = {}
        self.done: asyncio.Future[list[Payload]] = asyncio.get_running_loop().create_future()

    def answer(self, place: int, payload: Payload) -> None:
        """Of one of its rows."""
        self.answers[place] = payload
        if len(self.answers) == len(self.rows) and not self.done.done():
            self.done.set_result([self.answers[i] for i in range(len(self.rows))])

    def fail(self, refused: Refused) -> None:
        """Of all its rows."""
        if not self.done.done():
            self.done.set_exception(refused)


@dataclass
class Waiting:
    """A row in the queue."""

    job: Job
    place: int
    since: float
    """On the loop's clock."""

    @property
    def row(self) -> Row:
        """What it asks."""
        return self.job.rows[self.place]


class Batcher:
    """Gives rows to the model, as many at once as its token budget has room for."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self.limits = model.config.serve
        self.tokens = 0
        """Of the rows that wait."""
        self._rest_s = min(LONGEST_REST_S, model.config.parallel.timeout_s / 4)
        self._queue: deque[Waiting] = deque()
        self._more = asyncio.Event()
        self._ended = False
        self._thread = ThreadPoolExecutor(1, "forward")
        metrics.queue_tokens.set_function(lambda: self.tokens)

    async def ask(self, rows: list[Row]) -> list[Payload]:
        """One payload per row. Raises Refused; when cancelled, what has not begun is dropped."""
        if self._ended:
            raise _ended()
        tokens = sum(row.tokens for row in rows)
        limit = self.limits.max_waiting_tokens
        if tokens > limit:
            raise Refused(413, f"{tokens} tokens, at most {limit} (serve.max_waiting_tokens)")
        if self.tokens + tokens > limit:
            raise Refused(429, f"{self.tokens} tokens wait already", retry_after())
        job = Job(rows)
        now = asyncio.get_running_loop().time()
        # Longest first: rows of one length share a forward, and their order is nobody's business.
        places = sorted(range(len(rows)), key=lambda place: -rows[place].tokens)
        self._queue.extend(Waiting(job, place, now) for place in places)
        self.tokens += tokens
        self._more.set()
        try:
            return await job.done
        finally:
            self._drop(job)

    def _drop(self, job: Job) -> None:
        kept = [waiting for waiting in self._queue if waiting.job is not job]
        if len(kept) < len(self._queue):
            self._queue = deque(kept)
            self.tokens = sum(waiting.row.tokens for waiting in kept)

    async def run(self) -> None:
        """Work until cancelled. What the model does not survive is raised."""
        batch: list[Waiting] = []
        try:
            while True:
                await self._wait()
                batch = self._take()
                await self._answer(batch)
        finally:  # cancelled, or the model is gone: nobody is to wait for ever
            self._ended = True
            for waiting in (*batch, *self._queue):
                waiting.job.fail(_ended())

    async def _wait(self) -> None:
        """Until rows are there and others are not worth waiting for."""
        loop = asyncio.get_running_loop()
        while not self._queue:
            if not await self._arrival(loop.time() + self._rest_s):
                await self._in_thread(self.model.rest)
        until = self._queue[0].since + self.limits.window_ms / 1000
        budget = self.limits.max_batch_tokens * self.model.world.size
        while self._queue and self.tokens < budget and await self._arrival(until):
            pass

    async def _arrival(self, until: float) -> bool:
        """Whether a request comes before that time."""
        self._more.clear()
        try:
            async with asyncio.timeout_at(until):
                return await self._more.wait()
        except TimeoutError:
            return False

    def _take(self) -> list[Waiting]:
        """The first rows, as many as each rank has room for with its share."""
        taken: list[Waiting] = []
        longest = 0
        while self._queue:
            longest = max(longest, self._queue[0].row.tokens)
            per_rank = -(-(len(taken) + 1) // self.model.world.size)
            if taken and per_rank * longest > self.limits.max_batch_tokens:
                break
            taken.append(self._queue.popleft())
            self.tokens -= taken[-1].row.tokens
        return taken

    async def _answer(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        try:
            payloads = await self._in_thread(lambda: self._forward([w.row for w in batch]))
        except Exception as error:
            if not self.model.survives(error):
                raise
            await self._answer_apart(batch, error)
            return
        for waiting, payload in zip(batch, payloads, strict=True):
            waiting.job.answer(waiting.place, payload)

    async def _answer_apart(self, batch: list[Waiting], error: Exception) -> None:
        """One request's rows at a time: only the request that fails alone is told so."""
        jobs = list(dict.fromkeys(waiting.job for waiting in batch))
        if len(jobs) == 1:
            logging.getLogger(__name__).error("a forward failed", exc_info=error)
            said = str(error).strip().split("\n")[0] or type(error).__name__
            jobs[0].fail(Refused(500, f"the teacher fails at this request: {said}"))
            return
        for job in jobs:
            await self._answer([waiting for waiting in batch if waiting.job is job])

    def _forward(self, rows: list[Row]) -> list[Payload]:
        start = time.perf_counter()
        payloads = self.model.answer(rows)
        self.metrics.forward_seconds.observe(time.perf_counter() - start)
        self.metrics.batch_tokens.observe(sum(row.tokens for row in rows))
        self.metrics.batch_rows.observe(len(rows))
        return payloads

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        """After `run` has ended: let the other ranks go."""
        await self._in_thread(self.model.stop)
        self._thread.shutdown()


def _ended() -> Refused:
    return Refused(503, "the server ends")


def retry_after() -> dict[str, str]:
    """The header that tells a client when to come back."""
    return {"Retry-After": str(RETRY_AFTER_S)}
