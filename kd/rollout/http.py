"""JSON over HTTP: a failure is either worth another try (`Fault`) or the user's to mend."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from kd.types import UserError

OVERLOADED = (408, 425, 429)


class Fault(Exception):
    """A server that is away, slow, overloaded or broken. `answered`: it has said so itself."""

    def __init__(self, what: str, *, answered: bool = False) -> None:
        super().__init__(what)
        self.answered = answered


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
    try:
        async with asyncio.timeout(timeout_s):
            reply = await (client.get(url) if payload is None else client.post(url, json=payload))
    except TimeoutError:
        raise Fault(f"{url} has not answered within {timeout_s:g} s") from None
    except httpx.HTTPError as error:
        raise Fault(f"{url}: {str(error) or type(error).__name__}") from error
    status = reply.status_code
    if status >= 500 or status in OVERLOADED:
        raise Fault(f"{url} answers {status}: {_message(reply)}", answered=True)
    if status != 200:
        raise UserError(f"{url} refuses the request ({status}): {_message(reply)}")
    return _object(url, reply)


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
