"""The `vllm` engine: responses come from vLLM servers, which take over the weights as they change.

Each serves this run alone, and its own url leads to it, without a balancer between. With
`transfer=disk` they must be able to read the run's directory: on one machine, or on a shared disk.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from kd.parallel import DTYPES
from kd.remote import Fault, check_prompt, client
from kd.rollout.engine import Engine, EngineConfig, Policy, Sampling
from kd.rollout.vllm_chat import Answer, chat_request, read_answer
from kd.rollout.vllm_handshake import handshake, prompt_ids
from kd.rollout.vllm_nccl import over_nccl
from kd.rollout.vllm_servers import Servers, Weights
from kd.rollout.vllm_weights import Connection, DiskTransfer, WeightTransfer
from kd.types import Rollout, Sample, UserError

TRANSFERS: dict[str, Callable[[Policy, Connection], WeightTransfer]] = {
    "disk": DiskTransfer,
    "nccl": over_nccl,
}


@dataclass
class VllmEngineConfig(EngineConfig):
    """vLLM servers (scripts/vllm_server.sh starts one)."""

    urls: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000"])
    model: str | None = None
    """The name it is served under; None: the first that the server lists."""
    sync_every: int = 1
    """Hand over the weights whenever so many optimizer steps are done."""
    transfer: str = "disk"
    """How: disk (a folder in the run's directory) or nccl (from GPU to GPU; the servers are started
    with --weight-transfer-config)."""
    weights_dtype: str = "bfloat16"
    """In which they are handed over; the server computes in its own --dtype."""
    max_concurrency: int = 64
    """Requests (a prompt with all its responses) in flight, per rank."""
    timeout_s: float = 600.0
    """For a request, and for loading weights."""
    retries: int = 3
    """Further tries of a request that fails; a request refused is not tried again."""
    wait_s: float = 600.0
    """How long to wait for a server that is away, at the start and later, before the run ends."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise UserError(f"{key}.urls={self.urls}: give one or more, each once")
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or url.endswith("/"):
                raise UserError(f"{key}.urls: {url} should look like http://127.0.0.1:8000")
        for name in ("sync_every", "max_concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"{key}.{name}={getattr(self, name)}: must be at least 1")
        if self.timeout_s <= 0 or self.wait_s < 0 or self.retries < 0:
            raise UserError(
                f"{key}: timeout_s={self.timeout_s}, wait_s={self.wait_s}, retries={self.retries}: "
                "give a positive timeout_s and the others 0 or more"
            )
        if self.transfer not in TRANSFERS:
            raise UserError(f"{key}.transfer={self.transfer}: use {' or '.join(TRANSFERS)}")
        if self.weights_dtype not in DTYPES:
            raise UserError(
                f"{key}.weights_dtype={self.weights_dtype}: use one of {', '.join(DTYPES)}"
            )

    @property
    def is_remote(self) -> bool:
        """It generates on the servers."""
        return True

    def build(self, policy: Policy) -> Engine:
        """See the base class. Waits for the servers."""
        transfer, problem = None, None
        try:
            transfer = TRANSFERS[self.transfer](policy, self)
        except UserError as error:
            problem = str(error)
        policy.world.agree(problem)
        assert transfer is not None
        return self.connect(policy, transfer)

    def connect(self, policy: Policy, transfer: WeightTransfer) -> VllmEngine:
        """The engine with this transfer. Collective, as `build` is."""
        names, problem = {}, None
        if policy.world.is_main:
            try:
                names = asyncio.run(self._handshake(policy, transfer))
            except UserError as error:
                problem = str(error)
        policy.world.agree(problem)
        return VllmEngine(policy, self, policy.world.broadcast(names), transfer)

    async def _handshake(self, policy: Policy, transfer: WeightTransfer) -> dict[str, str]:
        async with client(len(self.urls)) as http:
            servers = self.servers(http, None)
            names = await handshake(servers, policy, self.model)
            await transfer.check(servers)
            return names

    def servers(self, http: httpx.AsyncClient, weights: Weights | None) -> Servers:
        """The servers, for one event loop."""
        return Servers(http, self.urls, weights, self.timeout_s, self.wait_s)


class VllmEngine:
    """Has servers generate, with the weights of the last `sync`.

    A prompt's responses come from one request with a seed of its own. They are the same in
    whatever company as far as the server's arithmetic is (vLLM's batch-invariant mode).
    """

    def __init__(
        self,
        policy: Policy,
        config: VllmEngineConfig,
        names: dict[str, str],
        transfer: WeightTransfer,
    ) -> None:
        self.policy, self.config, self.names, self.transfer = policy, config, names, transfer
        self.weights: Weights | None = None
        self.policy_step = 0
        # `generate` may run in a thread: weights do not change under it.
        self._lock = threading.Lock()

    # ---- weights ---------------------------------------------------------------------------------

    def sync(self, step: int) -> None:
        """See `Engine`. The first call always hands over, later ones every `sync_every` steps."""
        every = self.config.sync_every
        if self.weights is not None and step // every == self.policy_step // every:
            return
        with self._lock:
            label = self.policy.world.broadcast(f"{uuid.uuid4().hex}-{step}")
            self.weights = self.transfer.send(step, label)
            self.policy_step = step

    # ---- responses -------------------------------------------------------------------------------

    def generate(
        self, prompts: list[Sample], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[Rollout]:
        """See `Engine`. Raises UserError where no server can go on, or reads other prompts."""
        with self._lock:
            answers = asyncio.run(self._answers(prompts, n, sampling, seeds))
            return [
                Rollout(sample, list(response.ids), response.finished, self.policy_step)
                for sample, answer in zip(prompts, answers, strict=True)
                for response in (answer.responses if sampling.temperature else answer.responses * n)
            ]

    async def _answers(
        self, prompts: list[Sample], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[Answer]:
        """One per prompt, from servers that have held the weights throughout."""
        answers: dict[int, Answer] = {}
        # While the servers are at work; unlike theirs, this rendering is the one trained on.
        rendered = asyncio.create_task(
            asyncio.to_thread(lambda: [prompt_ids(self.policy, sample) for sample in prompts])
        )
        async with client(self.config.max_concurrency + len(self.config.urls)) as http:
            servers = self.config.servers(http, self.weights)
            for _ in range(self.config.retries + 1):
                todo = [i for i in range(len(prompts)) if i not in answers]
                jobs = [(i, prompts[i], seeds[i]) for i in todo]
                found = await self._answer_all(servers, jobs, n, sampling)
                answers |= dict(zip(todo, found, strict=True))
                gone = await servers.changed({answer.held for answer in answers.values()})
                answers = {i: answer for i, answer in answers.items() if answer.held not in gone}
                if len(answers) == len(prompts):
                    break
            else:
                raise UserError(
                    f"{', '.join(servers.urls)}: the weights have changed while responding, "
                    f"{self.config.retries + 1} times in succession. Does another run use them?"
                )
        for i, ours in enumerate(await rendered):
            check_prompt(answers[i].held.url, ours, answers[i].prompt_ids)
        return [answers[i] for i in range(len(prompts))]

    async def _answer_all(
        self, servers: Servers, jobs: list[tuple[int, Sample, int]], n: int, sampling: Sampling
    ) -> list[Answer]:
        free = asyncio.Semaphore(self.config.max_concurrency)
        request = partial(chat_request, self.policy)

        async def answer(number: int, sample: Sample, seed: int) -> Answer:
            async with free:
                return await self._answer(servers, number, request(sample, n, sampling, seed))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(*job)) for job in jobs]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, servers: Servers, number: int, request: dict[str, Any]) -> Answer:
        faults: list[str] = []
        while len(faults) <= self.config.retries:
            held = await servers.pick(number + len(faults))
            payload = {**request, "model": self.names[held.url]}
            try:
                reply = await servers.post(held.url, "/v1/chat/completions", payload)
                return read_answer(held, reply, request)
            except Fault as fault:
                servers.distrust(held.url)
                faults.append(str(fault))
            await asyncio.sleep(min(0.1 * 4 ** len(faults), 10))
        raise UserError(f"a request has failed {len(faults)} times, at last: {faults[-1]}")

    def close(self) -> None:
        """Remove the weights that were handed over."""
        self.transfer.close()
