"""The routes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kd.serve.batching import Batcher, retry_after
from kd.serve.config import MIB
from kd.serve.gate import error_body
from kd.serve.metrics import Metrics
from kd.serve.model import Row, ServedModel
from kd.serve.reader import Reader
from kd.serve.schema import Refused
from kd.teacher.wire import pack_reply

BINARY = "application/octet-stream"
T = TypeVar("T")


class Gone(Exception):
    """The client has hung up."""


class Service:
    """Answers requests for targets."""

    def __init__(self, model: ServedModel, batcher: Batcher, metrics: Metrics) -> None:
        self.model, self.batcher, self.metrics = model, batcher, metrics
        self.limits = model.config.serve
        self.reader = Reader(model, self.limits)
        self.under_way = 0
        self._threads = ThreadPoolExecutor(self.limits.render_threads, "render")

    async def targets(self, request: Request) -> bytes:
        """The reply to a request. Raises Refused, Gone."""
        if self.under_way >= self.limits.max_requests:
            raise Refused(429, f"{self.under_way} requests are under way", retry_after())
        self.under_way += 1
        try:
            rows = await self._rows(request)
            payloads = await unless_gone(request, self.batcher.ask(rows))
            prompts, teacher = [row.prompt_ids for row in rows], self.model.info.digest
            reply = await self._in_thread(lambda: pack_reply(payloads, prompts, teacher))
        finally:
            self.under_way -= 1
        self.metrics.rows.inc(len(rows))
        self.metrics.response_tokens.inc(sum(len(payload) for payload in payloads))
        return reply

    async def _rows(self, request: Request) -> list[Row]:
        body = await self._body(request)
        return await self._in_thread(lambda: self.reader(body))

    async def _body(self, request: Request) -> bytearray:
        body, timeout_s = bytearray(), self.limits.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.limits.max_request_mib * MIB:
                        raise Refused(
                            413,
                            f"a body of more than {self.limits.max_request_mib} MiB "
                            "(serve.max_request_mib)",
                        )
        except ClientDisconnect:
            raise Gone from None
        except TimeoutError:
            problem = f"no whole body within {timeout_s:g} s (serve.body_timeout_s)"
            raise Refused(408, problem) from None
        return body

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """When no request is under way."""
        self._threads.shutdown()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Its result; cancelled, and Gone raised, when the client hangs up. After the body is read."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # nothing comes but the end
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


def build(service: Service) -> FastAPI:
    """The app; `kd.serve.gate.Gate` goes around it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    model = service.model

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/info")
    async def info() -> dict[str, Any]:
        return dataclasses.asdict(model.info)

    @app.get("/v1/head")
    async def head() -> StreamingResponse:
        length = {"Content-Length": str(len(model.head))}
        return StreamingResponse(_pieces(model.head), media_type=BINARY, headers=length)

    @app.post("/v1/targets")
    async def targets(request: Request) -> Response:
        return Response(await service.targets(request), media_type=BINARY)

    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(Gone, _on_gone)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)
    return app


def _pieces(body: bytes) -> Iterator[bytes]:
    """So that a head of a GiB is not copied as a whole."""
    for start in range(0, len(body), 4 * MIB):
        yield body[start : start + 4 * MIB]


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body(message), status, headers, media_type="application/json")


def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, error.message, error.headers)


def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = None if error.headers is None else dict(error.headers)
    return _error(error.status_code, f"{request.url.path}: {error.detail}", headers)


def _on_failure(request: Request, error: Exception) -> Response:
    return _error(500, f"the server failed: {type(error).__name__}; its log says more")
