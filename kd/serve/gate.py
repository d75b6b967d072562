"""What every request goes through: who may ask, and whether there is room."""

from __future__ import annotations

import asyncio
import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kd.serve.metrics import Metrics
from kd.serve.schema import Refused

OPEN = "/health"
"""Without the token."""


class Gate:
    """An ASGI app around another: counts, refuses strangers, and everybody while the server ends.

    `drained` is set once it has begun to end and the last request has its answer.
    """

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.expected = None if token is None else f"Bearer {token}".encode()
        self.drained = asyncio.Event()
        self.draining = False
        self.under_way = 0

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True
        if not self.under_way:
            self.drained.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        assert scope["type"] == "http", scope["type"]
        status = 499  # the client is gone, as nginx calls it

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refused = self._refusal(scope)
        self.under_way += 1
        try:
            if refused is None:
                await self.app(scope, receive, counted)
            else:
                await _answer(refused, counted)
        finally:
            self.under_way -= 1
            self.metrics.requests.labels(str(status)).inc()
            if self.draining and not self.under_way:
                self.drained.set()

    def _refusal(self, scope: Scope) -> Refused | None:
        if self.draining:
            return Refused(503, "the server ends")
        if self.expected is None or scope["path"] == OPEN:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self.expected):
            return None
        return Refused(
            401,
            "this server wants its token as Authorization: Bearer …",
            {"WWW-Authenticate": "Bearer"},
        )


def error_body(message: str) -> bytes:
    """As clients of chat servers read it."""
    return json.dumps({"error": {"message": message}}, ensure_ascii=False).encode()


async def _answer(refused: Refused, send: Send) -> None:
    body = error_body(refused.message)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    headers |= refused.headers or {}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
