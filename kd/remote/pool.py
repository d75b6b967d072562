"""Several servers that can all answer the same: who is asked, and what a failure leads to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kd.remote.http import Fault
from kd.types import UserError

POLL_S = 0.2
LONGEST_REST_S = 10.0
T = TypeVar("T")


class Pool:
    """Gives each request to the server with the fewest under way; one that fails rests a while.

    For one event loop. A request that a server itself fails at is tried `retries` times more; where
    no server is there, or all are overloaded, it waits until none has answered for `wait_s`, and
    all have been tried since.
    """

    def __init__(self, urls: list[str], retries: int, wait_s: float, hint: str) -> None:
        self.urls, self.retries, self.wait_s = urls, retries, wait_s
        self.hint = hint
        """What to do when none is there."""
        self._under_way: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._rests_until = dict.fromkeys(urls, 0.0)
        self._last_answer = time.monotonic()
        self._failed_since: set[str] = set()

    async def call(self, attempt: Callable[[str], Awaitable[T]]) -> T:
        """`attempt(url)` of some server. Raises UserError when the pool gives up."""
        tries = 0
        if not self._under_way.total():  # nobody has had the chance to answer since
            self._note_answer()
        while True:
            url = await self._free()
            self._under_way[url] += 1
            try:
                result = await attempt(url)
            except Fault as fault:
                self._rest(url, fault)
                self._failed_since.add(url)
                tries += fault.answered and fault.retry_after_s is None
                if tries > self.retries:
                    raise UserError(
                        f"a request has failed {tries} times, at last: {fault}"
                    ) from None
                is_last = len(self._failed_since) == len(self.urls)
                if is_last and time.monotonic() - self._last_answer > self.wait_s:
                    raise UserError(
                        f"no server was of use for {self.wait_s:g} s: {fault}\n{self.hint}"
                    ) from None
            else:
                self._failures[url] = 0
                self._note_answer()
                return result
            finally:
                self._under_way[url] -= 1

    def _note_answer(self) -> None:
        self._last_answer = time.monotonic()
        self._failed_since.clear()

    def _rest(self, url: str, fault: Fault) -> None:
        rest_s = fault.retry_after_s
        if rest_s is None:
            self._failures[url] += 1
            rest_s = min(LONGEST_REST_S, 0.05 * 4 ** self._failures[url])
        self._rests_until[url] = time.monotonic() + rest_s

    async def _free(self) -> str:
        while True:
            now = time.monotonic()
            rested = [url for url in self.urls if self._rests_until[url] <= now]
            if rested:
                return min(rested, key=lambda url: self._under_way[url])
            await asyncio.sleep(min(POLL_S, max(0.0, min(self._rests_until.values()) - now)))
