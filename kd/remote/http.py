"""Requests over HTTP: a failure is either worth another try (`Fault`) or the user's to mend."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from kd.types import UserError

OVERLOADED = (408, 425, 429)


class Fault(Exception):
    """A server that is away, slow, overloaded or broken. `answered`: the fault is in its answer."""

    def __init__(
        self, what: str, *, answered: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(what)
        self.answered = answered
        self.retry_after_s = retry_after_s
        """When an overloaded server wants to be asked again; None: it is not just overloaded."""


def client(connections: int) -> httpx.AsyncClient:
    """A client of servers near by; time-outs are the callers'."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # A proxy of the environment is for the world outside, and answers 503 for a server of ours.
    return httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)


async def request_json(
    client: httpx.AsyncClient, url: str, payload: dict[str, Any] | None, timeout_s: float
) -> dict[str, Any]:
    """POST `payload`, or GET where it is None; the object answered, {} for an empty answer.

    Raises Fault after `timeout_s`, where no connection is made or kept, for a status of 500 or
    more and for an answer that is no JSON object; UserError for any other status but 200.
    """
    return _object(url, await _exchange(client, url, payload, timeout_s))


async def request_bytes(
    client: httpx.AsyncClient, url: str, payload: dict[str, Any] | None, timeout_s: float
) -> bytes:
    """The same, but the answer as it is."""
    return (await _exchange(client, url, payload, timeout_s)).content


async def _exchange(
    client: httpx.AsyncClient, url: str, payload: dict[str, Any] | None, timeout_s: float
) -> httpx.Response:
    try:
        async with asyncio.timeout(timeout_s):
            reply = await (client.get(url) if payload is None else client.post(url, json=payload))
    except TimeoutError:
        raise Fault(f"{url} has not answered within {timeout_s:g} s") from None
    except httpx.HTTPError as error:
        raise Fault(f"{url}: {str(error) or type(error).__name__}") from error
    status = reply.status_code
    if status >= 500 or status in OVERLOADED:
        wait = _retry_after_s(reply) if status == 429 else None
        said = f"{url} answers {status}: {_message(reply)}"
        # 503 is a server that starts or ends, or what stands before one that is away.
        raise Fault(said, answered=status != 503, retry_after_s=wait)
    if status != 200:
        raise UserError(f"{url} refuses the request ({status}): {_message(reply)}")
    return reply


def _retry_after_s(reply: httpx.Response) -> float:
    try:
        return min(60.0, max(0.0, float(reply.headers["retry-after"])))
    except (KeyError, ValueError):
        return 1.0


def _object(url: str, reply: httpx.Response) -> dict[str, Any]:
    if not reply.content:
        return {}
    try:
        value = reply.json()
    except ValueError:
        raise Fault(f"{url} answers no JSON: {reply.text[:80]!r}", answered=True) from None
    if not isinstance(value, dict):
        raise Fault(f"{url} answers no JSON object: {reply.text[:80]!r}", answered=True)
    return value


def _message(reply: httpx.Response) -> str:
    """What an OpenAI-compatible server says is wrong, else the start of its answer."""
    try:
        return str(reply.json()["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]
