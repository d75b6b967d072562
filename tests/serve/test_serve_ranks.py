"""`python -m kd.serve` as its users start it, on two ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kd.teacher.payload import Hidden, TopK, top_k
from kd.teacher.wire import prompt_digest, unpack_reply
from tests.conftest import subprocess_env
from tests.serve.conftest import Client, Local, request, rollouts, wait_for

FAMILY = "qwen3_5_hybrid"


@pytest.fixture
def started(folder: Callable[[str], Path]) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """The process, and a client of what it serves."""
    options = [
        f"teacher.name={folder(FAMILY)}",
        "teacher.dtype=float32",
        "parallel=fsdp",
        "parallel.nproc=2",
        "parallel.device=cpu",
        "parallel.cpu_threads=1",
        "serve.port=0",
        "serve.max_length=256",
        "serve.window_ms=500",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "kd.serve", *options],
        env=subprocess_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(f"serving {folder(FAMILY)} at http://127.0.0.1:"), (
            process.stderr.read()
        )
        yield process, Client(line.split()[-1])
    finally:
        process.kill()
        process.communicate()


def test_two_ranks_answer_as_one_and_end_together(started, folder):
    process, client = started
    local = Local(folder(FAMILY))
    # One row, two and five: a rank without rows, ranks without images, unequal shares.
    for count in (1, 2, 5):
        rows = rollouts(count, seed=count)
        reply = client.post(request(rows))
        assert reply.status_code == 200, reply.text
        unpacked = unpack_reply(reply.content)
        assert unpacked.prompts == [prompt_digest(local.prompt_ids(row)) for row in rows]
        for row, payload in zip(rows, unpacked.payloads, strict=True):
            assert isinstance(payload, Hidden)
            wanted = local.dense(row).hidden_ND
            torch.testing.assert_close(payload.hidden_ND, wanted, rtol=1e-5, atol=1e-5)
    rows = rollouts(4, seed=7)
    payloads = client.payloads(rows, kind="topk", k=6, temperature=2.0, vocab=300)
    for row, payload in zip(rows, payloads, strict=True):
        wanted = top_k(local.dense(row), torch.tensor(row.response_ids), 6, 2.0, 300)
        assert isinstance(payload, TopK)
        for name in ("logp_NK", "response_logp_N", "tail_N"):
            torch.testing.assert_close(
                getattr(payload, name), getattr(wanted, name), rtol=1e-5, atol=1e-5
            )

    with ThreadPoolExecutor() as threads:
        under_way = threads.submit(client.post, request(rows))
        wait_for(lambda: client.metric("kd_serve_queue_tokens") > 0)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/health").status_code == 503)
        assert client.post(request(rows)).status_code == 503
        assert under_way.result().status_code == 200
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
