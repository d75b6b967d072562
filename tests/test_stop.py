"""SIGUSR1: a checkpoint after the step, exit code 75, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kd.stop import EXIT_CODE, children
from tests.conftest import metrics, subprocess_env

RUN = ["train.max_steps=12", "student=digits_small", "data.num_workers=0", "doctor=never"]
RANK = """
import os, sys, time
from pathlib import Path
from kd.stop import Stopped, stop_request

Path(sys.argv[1], os.environ["RANK"]).touch()
while not Path(sys.argv[1], "sent").exists():
    time.sleep(0.02)
stop_request.listen()
ends = time.monotonic() + 30
while not stop_request.asked and time.monotonic() < ends:
    time.sleep(0.02)
if stop_request.asked:
    raise Stopped
"""


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=subprocess_env(), stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < ends, process.communicate()
        time.sleep(0.02)


def test_one_rank_that_is_told_stops_all_after_the_same_step(train, tmp_path):
    """On two ranks; and one goes on as if nothing had been."""
    whole = train("digits_teacher", "whole", *RUN)
    run = tmp_path / "runs" / "stopped"
    base = [f"run.dir={tmp_path / 'runs'}", "run.name=stopped", "logger=jsonl", *RUN]
    fast = ["train.log_every=1", "train.val_every=null", "data.val_samples=10"]
    options = [*base, *fast, "optim.warmup_steps=2", "parallel.cpu_threads=1"]
    two = ["parallel.nproc=2", "train.micro_batch_size=2"]
    process = start("kd.run", "--config-name", "digits_teacher", *options, *two)
    wait_for(process, (run / "metrics.jsonl").exists)
    os.kill(max(children(process.pid)), signal.SIGUSR1)  # the rank started last
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (EXIT_CODE, "")
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped" and 0 < status["step"] < 12
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{status['step']:06d}"]
    assert max(metrics(run, "train/loss")) == status["step"]

    train("digits_teacher", "stopped", *RUN)
    losses, expected = metrics(run, "train/loss"), metrics(whole, "train/loss")
    assert list(losses) == list(expected)
    assert all(abs(losses[step] - expected[step]) < 1e-4 * expected[step] for step in expected)


def test_torchrun_passes_it_on_also_before_the_ranks_listen(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    options = ["--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path)]
    process = start("kd.torchrun", *options)
    wait_for(process, lambda: Path(tmp_path, "0").exists() and Path(tmp_path, "1").exists())
    process.send_signal(signal.SIGUSR1)
    (tmp_path / "sent").touch()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, printed
