"""`python -m kd.serve` as its users start it, on two ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kd.teacher.payload import Hidden, TopK, top_k
from kd.teacher.wire import prompt_digest, unpack_reply
from tests.precision import assert_same_rows, log_prob_rounding
from tests.processes import LIMIT_S, Process, python, started, wait_for
from tests.serve.conftest import Client, Local, request, rollouts

FAMILY = "qwen3_5_hybrid"


@pytest.fixture
def served(folder: Callable[[str], Path]) -> Iterator[tuple[Process, Client]]:
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
        "serve.window_ms=1000",
    ]
    with started(*python("-m", "kd.serve", *options)) as process:
        process.wait_for(lambda: process.stdout.endswith("\n"))
        assert process.stdout.startswith(f"serving {folder(FAMILY)} at http://127.0.0.1:")
        yield process, Client(process.stdout.split()[-1])


def test_two_ranks_answer_as_one_and_end_together(served, folder):
    process, client = served
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
            assert_same_rows(payload.hidden_ND, local.dense(row).hidden_ND, local.vlm.model)
    rows = rollouts(4, seed=7)
    payloads = client.payloads(rows, kind="topk", k=6, temperature=2.0, vocab=300)
    for row, payload in zip(rows, payloads, strict=True):
        dense = local.dense(row)
        wanted = top_k(dense, torch.tensor(row.response_ids), 6, 2.0, 300)
        assert isinstance(payload, TopK)
        atol = log_prob_rounding(dense.hidden_ND @ dense.weight_VD.T / 2, local.vlm.model)
        for name in ("logp_NK", "response_logp_N", "tail_N"):
            got, right = getattr(payload, name), getattr(wanted, name)
            torch.testing.assert_close(got, right, rtol=0, atol=atol)

    with ThreadPoolExecutor() as threads:
        under_way = threads.submit(client.post, request(rows))
        wait_for(lambda: client.metric("kd_serve_queue_tokens") > 0)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: client.get("/health").status_code == 503)
        assert client.post(request(rows)).status_code == 503
        assert under_way.result(LIMIT_S).status_code == 200
    assert process.wait() == 0, process.tail()
    assert "Traceback" not in process.stderr
