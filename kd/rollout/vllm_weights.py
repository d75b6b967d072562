"""How weights come into the vLLM servers; and one way, by a folder in the run's directory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
from torch import Tensor

from kd.model import gather
from kd.parallel import DTYPES
from kd.remote import Fault, client
from kd.rollout.engine import Policy
from kd.rollout.vllm_servers import POLL_S, Servers, Weights
from kd.types import UserError


class Connection(Protocol):
    """What a transfer reads of the engine's config."""

    urls: list[str]
    weights_dtype: str
    timeout_s: float
    retries: int

    def servers(self, http: httpx.AsyncClient, weights: Weights | None) -> Servers:
        """The servers, for one event loop."""
        ...


class WeightTransfer(Protocol):
    """A way from the ranks into the servers."""

    async def check(self, servers: Servers) -> None:
        """Raises UserError at a server that cannot take weights this way."""
        ...

    def send(self, step: int, label: str) -> Weights:
        """Hand over the weights after optimizer step `step`; at least one server has them then.

        Collective. Raises UserError on every rank where none can take them.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class DiskTransfer:
    """A Hugging Face folder in the run's directory, which the servers load."""

    def __init__(self, policy: Policy, connection: Connection) -> None:
        self.policy, self.connection = policy, connection

    async def check(self, servers: Servers) -> None:
        """See `WeightTransfer`: whether they can read it shows when they do."""

    def send(self, step: int, label: str) -> FolderWeights:
        """See `WeightTransfer`."""
        policy = self.policy
        state = gather(policy.vlm)
        folder = policy.folder.resolve() / "rollout_weights" / f"step_{step:06d}"
        weights, problem = FolderWeights(folder, label), None
        if policy.world.is_main:
            try:
                write(folder, state, policy, self.connection.weights_dtype)
                asyncio.run(self._load(weights))
                remove_others(folder)
            except (UserError, OSError) as error:
                problem = str(error)
        policy.world.agree(problem)
        return weights

    async def _load(self, weights: FolderWeights) -> None:
        async with client(len(self.connection.urls)) as http:
            servers = self.connection.servers(http, weights)
            await servers.load_all()
            await servers.pick(0)

    def close(self) -> None:
        """Remove the weights that were handed over."""
        if self.policy.world.is_main:
            shutil.rmtree(self.policy.folder / "rollout_weights", ignore_errors=True)


@dataclass(frozen=True)
class FolderWeights:
    """Weights on a disk, which any rank can have a server load at any time."""

    folder: Path
    """A Hugging Face folder that the servers can read."""
    label: str

    @contextlib.asynccontextmanager
    async def turn(self, servers: Servers, url: str) -> AsyncIterator[None]:
        """See `Weights`."""
        path = self.folder.parent / f".server_{servers.urls.index(url)}.lock"
        with path.open("w") as file:
            deadline = time.monotonic() + servers.timeout_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Fault(
                            f"{path} is locked by another rank for {servers.timeout_s:g} s"
                        ) from None
                await asyncio.sleep(POLL_S)
            yield

    async def load(self, servers: Servers, url: str, held: str) -> None:
        """See `Weights`."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        try:
            await servers.post(url, "/collective_rpc", reload)
        except Fault as fault:
            if not fault.answered:
                raise
            # It stays paused: half of its weights have no data, a request would take it down.
            raise UserError(
                f"the weights in {self.folder} cannot be loaded: {fault}\n"
                f"{url} must be able to read that folder, and serve a model of the same sizes"
            ) from None


def write(folder: Path, state: dict[str, Tensor], policy: Policy, dtype: str) -> None:
    """Write a folder that is whole or absent."""
    target = DTYPES[dtype]
    # Each with memory of its own, or else a tied head is left out; and a server on a CPU, which
    # keeps a packed copy of its head, would go on with the head of the weights before.
    weights = {
        name: value.to(target if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    policy.vlm.model.save_pretrained(partial, state_dict=weights)
    policy.processor.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(partial / "config.json", file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def remove_others(folder: Path) -> None:
    """Remove the weights of other steps."""
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
