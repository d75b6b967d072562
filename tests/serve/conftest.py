"""Real servers of tiny models in a thread of this process, and the same models beside them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from kd.data import Collator, Renderer
from kd.model import FrozenVLM
from kd.parallel import ParallelConfig, World
from kd.remote import messages
from kd.serve.config import ServeConfig, ServerConfig
from kd.serve.model import ServedModel
from kd.serve.server import Server, bind
from kd.teacher import LocalTeacherConfig
from kd.teacher.payload import Payload
from kd.teacher.wire import unpack_reply
from kd.types import DenseTargets, Rollout, Sample
from tests.model.families import write
from tests.processes import LIMIT_S, join, wait_for

MAX_LENGTH = 256


def sample(number: int, images: int) -> Sample:
    """A question about so many pictures, other ones for each number."""
    noise = random.Random(number)
    pictures = [
        Image.frombytes(
            "RGB", (48, 32 + 16 * (k % 2)), noise.randbytes(3 * 48 * (32 + 16 * (k % 2)))
        )
        for k in range(images)
    ]
    ask = "What is in the picture?" + " And here?" * (number % 4)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": ask}]
    system = {"role": "system", "content": "A red square."}
    turns = [system] * (number % 2) + [{"role": "user", "content": content}]
    return Sample(str(number), turns, pictures, None)


def rollouts(count: int, seed: int = 0) -> list[Rollout]:
    """Responses of 1 to 12 tokens, none of them special, to questions with 0 to 2 pictures."""
    draw = random.Random(seed)
    return [
        Rollout(
            sample(i + 100 * seed, images=i % 3),
            [draw.randrange(30, 280) for _ in range(1 + (5 * i) % 12)],
            True,
            0,
        )
        for i in range(count)
    ]


def request(rows: list[Rollout], **asked: Any) -> dict[str, Any]:
    """The body that a client sends."""
    bodies = [{"messages": messages(row.sample), "response_ids": row.response_ids} for row in rows]
    return {"rows": bodies, "kind": "hidden", **asked}


@dataclass
class Client:
    """What tests ask of a server."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **options: Any) -> httpx.Response:
        headers = {**self.headers, **options.pop("headers", {})}
        return httpx.get(
            self.url + path, headers=headers, timeout=LIMIT_S, trust_env=False, **options
        )

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        headers = {**self.headers, **options.pop("headers", {})}
        if body is not None:
            options["json"] = body
        url = f"{self.url}/v1/targets"
        return httpx.post(url, headers=headers, timeout=LIMIT_S, trust_env=False, **options)

    def payloads(self, rows: list[Rollout], **asked: Any) -> list[Payload]:
        reply = self.post(request(rows, **asked))
        assert reply.status_code == 200, reply.text
        return unpack_reply(reply.content).payloads

    def metric(self, name: str, labels: str = "") -> float:
        """The value of one line of /metrics; 0 where there is none."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name}{labels} "):
                return float(line.split()[-1])
        return 0.0


@dataclass
class Running(Client):
    """A server in this process."""

    model: ServedModel = field(kw_only=True)
    uvicorn: Server = field(kw_only=True)


class Local:
    """The model of a folder, not sharded, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.vlm = FrozenVLM(AutoModelForImageTextToText.from_pretrained(folder))
        self.renderer = Renderer(AutoProcessor.from_pretrained(folder))
        self.collate = Collator(self.renderer, None, MAX_LENGTH, lockstep=False)

    def dense(self, row: Rollout) -> DenseTargets:
        return self.vlm.targets(self.collate([row]).teacher)

    def prompt_ids(self, row: Rollout) -> list[int]:
        return self.renderer.prompt(row.sample).ids_S.tolist()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, written once."""
    root = tmp_path_factory.mktemp("served")

    def of(family: str) -> Path:
        if not (root / family).exists():
            write(family, root / family)
        return root / family

    return of


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The process group of one rank."""
    threads = torch.get_num_threads()
    joined = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield joined
    joined.close()
    torch.set_num_threads(threads)


@contextlib.contextmanager
def serving(folder: Path, world: World, **limits: Any) -> Iterator[Running]:
    """A server with these settings."""
    limits = {"port": 0, "max_length": MAX_LENGTH, "render_threads": 2, **limits}
    config = ServerConfig(
        ServeConfig(**limits),
        LocalTeacherConfig(name=str(folder), dtype="float32"),
        ParallelConfig(device="cpu"),
    )
    config.validate()
    model = ServedModel(config, world)
    listener = bind(config.serve)
    started: list[tuple[Server, asyncio.AbstractEventLoop]] = []
    ready = threading.Event()

    async def work() -> None:
        server = Server(model, listener)
        started.append((server, asyncio.get_running_loop()))
        ready.set()
        await server.work()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(LIMIT_S)
    token = config.serve.token
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    server, loop = started[0]
    wait_for(lambda: server.started)  # before, the port is taken, but nobody listens
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Running(url, headers, model=model, uvicorn=server)
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(server.gate.drain)
        join(thread)
