"""A real `kd.serve`, and a proxy before it that does to its replies what networks do."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from tests.conftest import subprocess_env

START_TIMEOUT_S = 120


class Server:
    """`python -m kd.serve`, started and ended as often as a test likes."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.model, self.log, self.options = model, log, options
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the same port as before."""
        command = [sys.executable, "-m", "kd.serve", f"teacher.name={self.model}"]
        settings = [f"serve.port={self.port}", "parallel.compute_dtype=float32"]
        settings += ["teacher.dtype=float32", "parallel.cpu_threads=1", "serve.max_length=512"]
        settings += self.options
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, *settings], stdout=out, stderr=out, env=subprocess_env()
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            said = self.log.read_bytes()[start:].decode(errors="replace")
            found = re.search(r"serving .* at http://127\.0\.0\.1:(\d+)", said)
            if found:
                self.port = int(found[1])
                return
            assert self.process.poll() is None, said
            time.sleep(0.1)
        raise AssertionError(said)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As an operator would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


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
            method, self.upstream + path, content=body or None, timeout=60, trust_env=False
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
