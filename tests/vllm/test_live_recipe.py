"""The whole recipe with its responses from a real server. Run by scripts/test_vllm.sh."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import metrics
from tests.processes import join
from tests.vllm.conftest import random_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

KEYS = ("train/loss", "train/grad_norm", "rollout/length_mean", "rollout/truncated")


@pytest.fixture
def base(processor, server, tmp_path) -> list[str]:
    """Overrides of digits_opd: a student and a teacher of the server's architecture, greedy."""
    for name, seed in {"student": 2, "teacher": 3}.items():
        random_model(processor, seed).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    return [
        *("train.max_steps=6", "train.val_every=null", "optim.warmup_steps=0", "optim.lr=0.002"),
        *("train.micro_batch_size=2", "train.grad_accum=2", "train.log_every=1"),
        *(f"student.name={tmp_path / 'student'}", f"teacher.name={tmp_path / 'teacher'}"),
        *("rollout.sampling.temperature=0", "rollout.sampling.top_p=1", "data.max_length=256"),
        *("student.dtype=float32", "teacher.dtype=float32", "parallel.cpu_threads=1"),
    ]


@pytest.fixture
def remote(server) -> list[str]:
    """The server as the engine."""
    return [
        *("rollout/engine=vllm", f"rollout.engine.urls=[{server.url}]"),
        *("rollout.engine.weights_dtype=float32", "rollout.engine.wait_s=400"),
    ]


def assert_same(ours: Path, theirs: Path) -> None:
    for key in KEYS:
        assert metrics(ours, key) == pytest.approx(metrics(theirs, key), rel=2e-3), key


def test_the_server_trains_the_student_as_its_own_generation_does(train, base, remote):
    """Greedy, on digit images: every step has the weights of the step before."""
    own = train("digits_opd", "own", *base, fast=False)
    served = train("digits_opd", "served", *base, *remote, fast=False)
    losses = metrics(own, "train/loss")
    assert losses[6] < losses[1], "the weights have moved"
    assert_same(served, own)


def test_a_window_ahead_is_one_behind_and_resumes(train, base, remote):
    options = [*base, *remote, "rollout.async_steps=1"]
    saving = ["train.save_every=3", "checkpoint.keep_last=9"]
    whole = train("digits_opd", "ahead", *options, *saving, fast=False)
    staleness = metrics(whole, "rollout/staleness")
    assert staleness == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    expected = {key: metrics(whole, key) for key in KEYS}
    shutil.rmtree(whole / "checkpoints" / "step_000006")
    train("digits_opd", "ahead", *options, *saving, fast=False)
    for key in KEYS:
        assert metrics(whole, key) == pytest.approx(expected[key], rel=2e-3), key
    assert metrics(whole, "rollout/staleness") == staleness


def test_a_server_killed_in_mid_run_and_brought_back(train, base, remote, server, tmp_path):
    own = train("digits_opd", "own", *base, fast=False)
    log = tmp_path / "runs" / "killed" / "metrics.jsonl"
    killed = threading.Event()

    def kill_and_bring_back() -> None:
        deadline = time.monotonic() + 300
        while not (log.exists() and '"step": 2' in log.read_text()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        server.kill()
        killed.set()
        server.start()

    trouble = threading.Thread(target=kill_and_bring_back)
    trouble.start()
    try:
        served = train("digits_opd", "killed", *base, *remote, fast=False)
    finally:
        join(trouble)
        server.wait()
    assert killed.is_set()
    assert_same(served, own)


def test_a_server_away_for_good_ends_the_run_with_a_whole_checkpoint(
    train, base, remote, server, tmp_path, capsys
):
    log = tmp_path / "runs" / "away" / "metrics.jsonl"

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not (log.exists() and '"step": 2' in log.read_text()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        server.kill()

    trouble = threading.Thread(target=kill)
    trouble.start()
    options = [*base, *remote, "rollout.engine.wait_s=3", "train.save_every=1"]
    with pytest.raises(SystemExit) as exit_:
        train("digits_opd", "away", *options, "train.max_steps=400", fast=False)
    join(trouble)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and server.url in error and "Traceback" not in error
    server.start()
    server.wait()
    done = max(metrics(tmp_path / "runs" / "away", "train/loss"))
    assert (tmp_path / "runs" / "away" / "checkpoints" / f"step_{done:06d}").exists()
