"""A real `kd.serve`, and a proxy before it that does to its replies what networks do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from tests.processes import LIMIT_S, Process, python


class Server:
    """`python -m kd.serve`, started and ended as often as a test likes."""

    def __init__(self, model: Path, *options: str, compute_dtype: str = "float32") -> None:
        self.model, self.options, self.compute_dtype = model, options, compute_dtype
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the same port as before."""
        command = python("-m", "kd.serve", f"teacher.name={self.model}")
        settings = [f"serve.port={self.port}", f"parallel.compute_dtype={self.compute_dtype}"]
        settings += ["teacher.dtype=float32", "parallel.cpu_threads=1"]
        settings += ["serve.max_length=512", *self.options]
        self.process = Process(*command, *settings, one_output=True)
        self.process.wait_for(self._address)
        self.port = int(self._address()[1])

    def _address(self) -> re.Match[str] | None:
        return re.search(r"serving .* at http://127\.0\.0\.1:(\d+)", self.process.stdout)

    def kill(self) -> None:
        """kill -9."""
        self.process.end()

    def stop(self) -> None:
        """As an operator would."""
        if self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
            self.process.wait()
        self.process.end()


Fault = Callable[[int, bytes], tuple[int, bytes] | None]
"""(number of the request for targets, good reply) -> (status, body), or None: hang up."""


@dataclass
class Proxy:
    """Hands requests on, and replies as `fault` makes them."""

    upstream: str
    fault: Fault = lambda number, body: (200, body)
    others: Callable[[str, bytes], bytes] = lambda path, body: body
    """(path, good reply) -> reply, to other requests."""
    before: Callable[[int], None] = lambda number: None
    """Called with the number of a request for targets before it is handed on."""
    requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, bytes] | None:
        number = 0
        if path == "/v1/targets":
            with self._lock:
                self.requests += 1
                number = self.requests
            self.before(number)
        good = httpx.request(
            method, self.upstream + path, content=body or None, timeout=LIMIT_S, trust_env=False
        )
        if number and good.status_code == 200:
            return self.fault(number, good.content)
        return good.status_code, self.others(path, good.content)


@contextlib.contextmanager
def proxied(upstream: str, **behaviour) -> Iterator[tuple[Proxy, str]]:
    """The proxy and its url."""
    proxy = Proxy(upstream, **behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            reply = proxy.reply(self.command, self.path, body)
            if reply is None:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(reply[0])
            self.send_header("content-length", str(len(reply[1])))
            if reply[0] == 429:
                self.send_header("retry-after", "0.2")
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(reply[1])

        do_GET = do_POST

        def log_message(self, format: str, *args) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
