"""vLLM servers during one call of the engine: which are up, and which weights they hold.

A server brought back holds the weights it was started with, and one that two runs share holds
those of either. So every loading is stamped with a version of its own (`/update_weight_version`),
which is read before a server is used and again when its responses are in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx

from kd.remote import Fault, request_json
from kd.types import UserError

log = logging.getLogger("kd")

PROBE_TIMEOUT_S = 30.0
POLL_S = 0.5
T = TypeVar("T")


class Weights(Protocol):
    """What the servers are to hold, and how they come by it."""

    @property
    def label(self) -> str:
        """Of this step of this run alone."""
        ...

    def turn(self, servers: Servers, url: str) -> AbstractAsyncContextManager[None]:
        """One rank at a time: two loadings at once would resume each other's pause.

        Raises Fault where the weights cannot be had now.
        """
        ...

    async def load(self, servers: Servers, url: str, held: str) -> None:
        """Have the server, which is paused, take them; `held` is the version it had before.

        Raises Fault, or UserError where it never can.
        """
        ...


@dataclass(frozen=True)
class Held:
    """A server, and the version of one loading of weights into it."""

    url: str
    version: str


class Servers:
    """The servers at `urls`, to be used from one event loop. `weights` None: those they have."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        urls: list[str],
        weights: Weights | None,
        timeout_s: float,
        wait_s: float,
    ) -> None:
        self.client, self.urls, self.weights = client, urls, weights
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self._held: dict[str, Held] = {}
        self._faults: dict[str, tuple[float, Fault]] = {}
        self._locks = {url: asyncio.Lock() for url in urls}

    async def get(self, url: str, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
        """Ask something that is quickly answered."""
        return await request_json(self.client, url + path, None, min(timeout_s, self.timeout_s))

    async def post(self, url: str, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Have something done."""
        return await request_json(self.client, url + path, payload, self.timeout_s)

    async def pick(self, number: int) -> Held:
        """A server that holds the weights: the `number`-th, or the next after it that is up.

        Raises UserError where none is for `wait_s`, and where one refuses the weights.
        """
        start = number % len(self.urls)
        order = self.urls[start:] + self.urls[:start]
        return await self.waited(lambda: self._first(order))

    async def waited(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """`attempt()`, until it has no Fault. Raises UserError after `wait_s` of them."""
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                return await attempt()
            except Fault as fault:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"no vLLM server was of use for {self.wait_s:g} s: {fault}\n"
                        "Start it again (scripts/vllm_server.sh), then the run, with the same "
                        "command: it goes on from its last checkpoint"
                    ) from None
            await asyncio.sleep(POLL_S)

    async def load_all(self, ended: Callable[[str], None] = lambda url: None) -> list[Held]:
        """Have all load, and give those that have; one that is away does when it is back.

        `ended` is called with each url that has loaded, or has failed to.
        """

        async def load(url: str) -> Held | None:
            try:
                return await self.ready(url)
            except Fault as fault:
                log.warning("weights not handed over yet: %s", fault)
                return None
            finally:
                ended(url)

        found = await asyncio.gather(*map(load, self.urls), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if isinstance(one, Held)]

    async def any_up(self) -> None:
        """See that there is one. Raises Fault."""
        faults = []
        for url in self.urls:
            try:
                await self._version(url)
                return
            except Fault as fault:
                faults.append(str(fault))
        raise Fault("; ".join(faults))

    def distrust(self, url: str) -> None:
        """Ask the server again before its next use."""
        self._held.pop(url, None)

    async def changed(self, held: set[Held]) -> set[Held]:
        """Those of `held` that are gone by now: no saying when, nor what responded since."""
        now: set[Held] = set()
        for url in {h.url for h in held}:
            with contextlib.suppress(Fault):
                now.add(Held(url, await self._version(url)))
        for gone in held - now:
            self.distrust(gone.url)
        return held - now

    # ---- one server ------------------------------------------------------------------------------

    async def _first(self, urls: list[str]) -> Held:
        faults = []
        for url in urls:
            try:
                return await self.ready(url)
            except Fault as fault:
                faults.append(str(fault))
        raise Fault("; ".join(faults))

    async def ready(self, url: str) -> Held:
        """See that the server holds the weights. Raises Fault, at once if it had one just now."""
        async with self._locks[url]:
            if url not in self._held:
                until, fault = self._faults.get(url, (0.0, None))
                if fault is not None and time.monotonic() < until:
                    raise fault
                try:
                    self._held[url] = Held(url, await self._ensure(url))
                except Fault as fault:
                    self._faults[url] = (time.monotonic() + POLL_S, fault)
                    raise
            return self._held[url]

    async def _version(self, url: str) -> str:
        return str((await self.get(url, "/weight_info")).get("weight_version"))

    async def _ensure(self, url: str) -> str:
        version = await self._version(url)
        if self.weights is None:
            if version != "default":
                raise UserError(
                    f"{url} holds weights that a run has loaded into it, not those of its own "
                    "model: start it again"
                )
            return version
        if not self._is_right(version):
            async with self.weights.turn(self, url):
                version = await self._version(url)
                if not self._is_right(version):
                    version = await self._load(url, self.weights, version)
        return version

    def _is_right(self, version: str) -> bool:
        return self.weights is not None and version.startswith(f"{self.weights.label}/")

    async def _load(self, url: str, weights: Weights, held: str) -> str:
        version = f"{weights.label}/{uuid.uuid4().hex}"
        # Whatever becomes of this loading, the weights before are not there any more.
        await self.post(url, "/update_weight_version", {"new_version": "loading"})
        # Paused, and what runs is aborted: the worker drops its image embeddings with the weights,
        # and a request that counts on one of them takes the server down.
        await self.post(url, "/pause?mode=abort", {})
        await weights.load(self, url, held)
        await self.post(url, "/reset_encoder_cache", {})
        if not (await self.post(url, "/reset_prefix_cache", {})).get("success"):
            raise Fault(f"{url} keeps the attention cache of its old weights")
        await self.post(url, "/update_weight_version", {"new_version": version})
        await self.post(url, "/resume", {})
        return version
