"""One rank of a server: rank 0 listens and answers, the others follow it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from kd.serve.app import Service, build
from kd.serve.batching import Batcher
from kd.serve.config import ServeConfig, ServerConfig
from kd.serve.gate import Gate
from kd.serve.metrics import Metrics
from kd.serve.model import ServedModel
from kd.types import UserError

# Longer than clients keep an idle connection: who closes first must not be the server, or a request
# on its way meets a closed door.
KEEP_ALIVE_S = 75


def run_rank(config: ServerConfig) -> None:
    """Load, serve, and return after SIGTERM or SIGINT. Raises UserError."""
    world = config.parallel.build()
    listener, problem = None, None
    if world.is_main:
        try:
            listener = bind(config.serve)
        except UserError as error:
            problem = str(error)
    world.agree(problem)
    model = ServedModel(config, world)
    if listener is None:
        follow(model)
    else:
        asyncio.run(lead(model, listener))
    world.close()


async def lead(model: ServedModel, listener: socket.socket) -> None:
    """Answer requests, until a signal."""
    await Server(model, listener).work()


def bind(config: ServeConfig) -> socket.socket:
    """Take the port, so that a taken one shows before the model is loaded; nobody is let in yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        # With the protocol left out asyncio does not set TCP_NODELAY: 40 ms more per reply.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen at {config.host}, port {config.port}: {error.strerror}; choose others "
            "with serve.host and serve.port (0: a free port)"
        ) from None
    return listener


def follow(model: ServedModel) -> None:
    """Work until rank 0 ends it, which a signal to all ranks ends gracefully."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    model.follow()


class Server(uvicorn.Server):
    """Uvicorn that says where it is, and on a signal answers first what it has taken on.

    Made in the event loop that it runs in.
    """

    def __init__(self, model: ServedModel, listener: socket.socket) -> None:
        self.model, self.listener = model, listener
        metrics = Metrics()
        self.batcher = Batcher(model, metrics)
        self.service = Service(model, self.batcher, metrics)
        self.gate = Gate(build(self.service), model.config.serve.token, metrics)
        self._loop = asyncio.get_running_loop()
        super().__init__(
            uvicorn.Config(
                self.gate,
                # Chosen here, not by what is installed beside it.
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )

    async def work(self) -> None:
        """Answer requests until told to end. Raises what the model does not survive."""
        batching = asyncio.create_task(self.batcher.run())
        serving = asyncio.create_task(self.serve([self.listener]))
        drained = asyncio.create_task(self.gate.drained.wait())
        await asyncio.wait({batching, serving, drained}, return_when=asyncio.FIRST_COMPLETED)
        self.gate.drain()
        self.should_exit = True
        await serving
        self.service.close()
        drained.cancel()
        if batching.done():
            logging.getLogger(__name__).error("the teacher is gone: the server ends")
            await batching
        batching.cancel()
        await asyncio.gather(batching, return_exceptions=True)
        await self.batcher.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Also say that it listens."""
        await super().startup(sockets)
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {self.model.info.model} at http://{shown}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end at once."""
        if self.gate.draining:
            self.should_exit = self.force_exit = True
        # It may interrupt anything, so the loop is asked to do it.
        self._loop.call_soon_threadsafe(self.gate.drain)
