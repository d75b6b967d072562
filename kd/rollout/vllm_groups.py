"""The NCCL groups of rank 0 with the workers of each vLLM server.

Every server is a group of its own: one that is brought back joins again alone, and one that fails
does not take the others with it.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from kd.remote import Fault
from kd.rollout.nccl import Communicator
from kd.rollout.vllm_servers import Held, Servers
from kd.types import UserError


class Groups:
    """Kept from one hand-over to the next."""

    def __init__(self, make: Callable[[], Communicator], buffer_bytes: int) -> None:
        self.make, self.buffer_bytes = make, buffer_bytes
        self._joined: dict[str, Communicator] = {}
        self._versions: dict[str, str] = {}

    async def join(self, servers: Servers, url: str, held: str) -> Communicator:
        """The group with this server, whose version is `held`. Raises Fault, or UserError."""
        # Another version: started again, or used by another run, and of our group no more.
        if url in self._joined and self._versions.get(url) == held:
            return self._joined[url]
        self.drop(url)
        await servers.post(url, "/shutdown_weight_transfer_engine", {})
        num_ranks = 1 + int((await servers.get(url, "/get_world_size"))["world_size"])
        communicator = self.make()
        init_info = {
            "nccl_unique_id_b64": base64.b64encode(communicator.unique_id).decode(),
            "rank_offset": 1,
            "world_size": num_ranks,
            "packed": True,
            "packed_buffer_size_bytes": self.buffer_bytes,
            "packed_num_buffers": 2,
        }
        joins = _in_thread(partial(communicator.join, num_ranks))
        try:
            await servers.post(url, "/init_weight_transfer_engine", {"init_info": init_info})
            async with asyncio.timeout(servers.timeout_s):
                await joins
        except TimeoutError:
            raise Fault(f"{url} has not joined the group within {servers.timeout_s:g} s") from None
        except RuntimeError as error:
            raise UserError(f"no NCCL group with {url}: {error}") from None
        self._joined[url] = communicator
        return communicator

    def keep(self, held: list[Held]) -> None:
        """Keep the groups with these servers, whose versions are known, and leave the others."""
        self._versions = {one.url: one.version for one in held}
        for url in self._joined.keys() - self._versions.keys():
            self.drop(url)

    def drop(self, url: str) -> None:
        """Leave the group with a server, if there is one."""
        self._versions.pop(url, None)
        communicator = self._joined.pop(url, None)
        if communicator is not None:
            communicator.abort()


def _in_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """In a daemon: nothing ends the wait for a rank that never joins, and no exit waits for it."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    return asyncio.wrap_future(future)
