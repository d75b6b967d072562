"""Weights from GPU to GPU: broadcast from rank 0 to the workers of each server.

By the routes of vLLM 0.32 for a server started with --weight-transfer-config
'{"backend":"nccl"}': `/get_world_size`, `/init_weight_transfer_engine`, `/start_weight_update`,
`/update_weights`, which answers when all is received, and `/finish_weight_update`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from kd.model import WeightStream
from kd.parallel import DTYPES
from kd.remote import Background, Fault, client
from kd.rollout.engine import Policy
from kd.rollout.nccl import Communicator, NcclCommunicator
from kd.rollout.vllm_groups import Groups
from kd.rollout.vllm_packed import cut, packed
from kd.rollout.vllm_servers import Held, Servers
from kd.rollout.vllm_weights import Connection
from kd.types import UserError

log = logging.getLogger("kd")

OPTION = """--weight-transfer-config '{"backend":"nccl"}'"""
BUFFER_BYTES = 2**29
"""A buffer holds this and at most one tensor more; there are two."""
POLL_S = 0.001


def over_nccl(policy: Policy, connection: Connection) -> NcclTransfer:
    """The transfer for GPUs. Raises UserError without one, or without NCCL."""
    device = policy.world.device
    if device.type != "cuda":
        raise UserError(
            f"rollout.engine.transfer=nccl needs a GPU, and this run is on a {device.type}: "
            "set rollout.engine.transfer=disk"
        )
    try:
        version = NcclCommunicator(device).version()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"rollout.engine.transfer=nccl: {error}\n"
            "Set KD_NCCL_SO_PATH to the NCCL library (libnccl.so.2), or use transfer=disk"
        ) from None
    if policy.world.is_main:
        log.info("weights go to vLLM over NCCL %s; the servers need the same version", version)
    return NcclTransfer(policy, connection, lambda: NcclCommunicator(device))


@dataclass(frozen=True)
class HandedOver:
    """Weights that only the servers have: one that loses them is of no use until the next."""

    label: str

    def turn(self, servers: Servers, url: str) -> AbstractAsyncContextManager[None]:
        """See `Weights`."""
        raise Fault(
            f"{url} does not hold this step's weights, and over NCCL it gets weights only when the "
            "next are handed over"
        )

    async def load(self, servers: Servers, url: str, held: str) -> None:
        """See `Weights`."""
        raise AssertionError("nobody's turn")


class NcclTransfer:
    """Streams the weights, so that no rank holds the whole model."""

    def __init__(
        self,
        policy: Policy,
        connection: Connection,
        make: Callable[[], Communicator],
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Raises UserError where the model cannot be streamed."""
        self.policy, self.connection, self.buffer_bytes = policy, connection, buffer_bytes
        self.stream = WeightStream(policy.vlm, DTYPES[connection.weights_dtype], policy.world)
        cut(self.stream.specs, buffer_bytes)  # refused now rather than at the first step
        self.groups = Groups(make, buffer_bytes)

    async def check(self, servers: Servers) -> None:
        """See `WeightTransfer`."""
        for url in servers.urls:
            said = await servers.waited(partial(self._backend, servers, url))
            if "for NCCLWeightTransferEngine:" not in said:
                raise UserError(
                    f"{url} takes no weights over NCCL ({said}): start it with {OPTION} "
                    "(KD_VLLM_TRANSFER=nccl for scripts/vllm_server.sh)\n"
                    "or set rollout.engine.transfer=disk"
                )

    async def _backend(self, servers: Servers, url: str) -> str:
        """What the server says to an offer without contents: it names its backend.

        `/server_info` would tell as well, but fails in an environment without pip.
        """
        try:
            await servers.post(url, "/init_weight_transfer_engine", {"init_info": {}})
        except Fault as fault:
            if not fault.answered:
                raise
            return str(fault)
        return "it accepts an offer without contents"

    def send(self, step: int, label: str) -> HandedOver:
        """See `WeightTransfer`. Tries again where the servers that began have not ended."""
        held: list[Held] = []
        for _ in range(self.connection.retries + 1):
            held = self.policy.world.broadcast(self._attempt(label))
            if held:
                return HandedOver(label)
        self.policy.world.agree(
            f"no vLLM server has taken the weights after step {step}, "
            f"{self.connection.retries + 1} times in succession: see the warnings above"
        )
        raise AssertionError("agreed")

    def _attempt(self, label: str) -> list[Held]:
        """The servers that have the weights, on rank 0. Collective."""
        world, problem, held = self.policy.world, None, []
        buffers = packed(self.stream, self.buffer_bytes, world.device)
        if world.is_main:
            sending = Sending(label, self.connection, self.groups, self.stream)
            sending.transmit(buffers)
            try:
                held = sending.finish()
            except UserError as error:
                problem = str(error)
        else:
            for _ in buffers:
                pass
        world.agree(problem)
        return held

    def close(self) -> None:
        """Leave the groups."""
        for url in self.connection.urls:
            self.groups.drop(url)


class Sending:
    """One hand-over, on rank 0: requests in the background, broadcasts in the foreground.

    It is the `Weights` of the servers for that long.
    """

    def __init__(
        self, label: str, connection: Connection, groups: Groups, stream: WeightStream
    ) -> None:
        """Begin the requests."""
        self.label, self.connection, self.groups = label, connection, groups
        self.update_info = {
            "names": [spec.name for spec in stream.specs],
            "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in stream.specs],
            "shapes": [list(spec.shape) for spec in stream.specs],
        }
        self._begun: dict[str, Future[Receiver | None]] = {url: Future() for url in connection.urls}
        self._background = Background()
        self._requests = self._background.start(self._request_all())

    # ---- requests --------------------------------------------------------------------------------

    async def _request_all(self) -> list[Held]:
        try:
            async with client(2 * len(self.connection.urls)) as http:
                servers = self.connection.servers(http, self)
                await servers.waited(servers.any_up)
                return await servers.load_all(ended=self._ended)
        finally:
            for url in self._begun:
                self._ended(url)

    def _ended(self, url: str) -> None:
        if not self._begun[url].done():
            self._begun[url].set_result(None)

    @contextlib.asynccontextmanager
    async def turn(self, servers: Servers, url: str) -> AsyncIterator[None]:
        """See `Weights`: no other rank loads."""
        yield

    async def load(self, servers: Servers, url: str, held: str) -> None:
        """See `Weights`."""
        try:
            communicator = await self.groups.join(servers, url, held)
            await servers.post(url, "/start_weight_update", {})
            payload = {"update_info": self.update_info}
            update = asyncio.create_task(servers.post(url, "/update_weights", payload))
            self._begun[url].set_result(Receiver(url, communicator, update))
            await update
            await servers.post(url, "/finish_weight_update", {})
        except Fault as fault:
            if not fault.answered:
                raise
            # It stays paused: some of its weights have no data, a request would take it down.
            raise UserError(
                f"{url} cannot take the weights over NCCL: {fault}\n"
                "It must serve a model of the same sizes; start it again before the next try"
            ) from None

    # ---- broadcasts ------------------------------------------------------------------------------

    def transmit(self, buffers: Iterator[Tensor]) -> None:
        """Broadcast all buffers, whoever receives them: filling them is a collective."""
        begun = [future.result() for future in self._begun.values()]
        receivers = [receiver for receiver in begun if receiver is not None]
        for buffer in buffers:
            for receiver in receivers:
                receiver.send(buffer)
            self._settle(receivers, 1)  # this one leaves while the next is filled
        self._settle(receivers, 0)

    def _settle(self, receivers: list[Receiver], left: int) -> None:
        """Wait until no more than `left` buffers are on their way to each; give up who fails."""
        deadline = time.monotonic() + self.connection.timeout_s
        for receiver in receivers:
            while not receiver.is_settled(left):
                if time.monotonic() > deadline:
                    receiver.give_up(f"has taken no weights for {self.connection.timeout_s:g} s")
                time.sleep(POLL_S)

    def finish(self) -> list[Held]:
        """The servers that have the weights now. Raises UserError as the requests did."""
        held: list[Held] = []
        try:
            held = self._requests.result()
        finally:
            self._background.close()
            self.groups.keep(held)
        return held


class Receiver:
    """A server that waits for broadcasts."""

    def __init__(
        self, url: str, communicator: Communicator, update: asyncio.Task[dict[str, Any]]
    ) -> None:
        self.url, self.communicator, self.update = url, communicator, update
        self.is_lost = False
        self._sent: list[tuple[Callable[[], bool], Tensor]] = []

    def send(self, buffer: Tensor) -> None:
        """Begin to send."""
        if self.is_lost:
            return
        try:
            self._sent.append((self.communicator.broadcast(buffer), buffer))
        except RuntimeError as error:
            self.give_up(str(error))

    def is_settled(self, left: int) -> bool:
        """Whether no more than `left` of what was sent is on its way, or nothing will arrive."""
        while self._sent and self._sent[0][0]():
            self._sent.pop(0)
        # An update that has succeeded has received all: only the event is late.
        if self.update.done() and (self.update.cancelled() or self.update.exception()):
            self.give_up("has stopped receiving")
        return self.is_lost or len(self._sent) <= left

    def give_up(self, why: str) -> None:
        """Leave the group: a broadcast that nobody receives would never end."""
        if not self.is_lost:
            log.warning("weights to %s: it %s", self.url, why)
            self.is_lost = True
            self.communicator.abort()
