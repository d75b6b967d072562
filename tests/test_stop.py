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

from kd.checkpoint import verify
from kd.stop import EXIT_CODE, children
from tests.conftest import FAST, metrics, subprocess_env

RUN = [
    *("student=digits_small", "train.max_steps=99", "data.num_workers=0", "doctor=never"),
    *("logger=jsonl", "parallel.nproc=2"),
]
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


def test_one_rank_that_is_told_stops_all_after_the_same_step(tmp_path):
    """That it goes on as if nothing had been is seen by scripts/test_slurm.sh."""
    run = tmp_path / "run"
    options = [f"run.dir={tmp_path}", "run.name=run", *FAST, *RUN]
    process = start("kd.run", "--config-name", "digits_teacher", *options)
    wait_for(process, (run / "metrics.jsonl").exists)
    os.kill(max(children(process.pid)), signal.SIGUSR1)  # the rank started last
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (EXIT_CODE, "")
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped" and 0 < status["step"] < 99
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{status['step']:06d}" and verify(checkpoint) is None
    assert max(metrics(run, "train/loss")) == status["step"]


def test_torchrun_passes_it_on_also_before_the_ranks_listen(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    options = ["--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path)]
    process = start("kd.torchrun", *options)
    wait_for(process, lambda: Path(tmp_path, "0").exists() and Path(tmp_path, "1").exists())
    process.send_signal(signal.SIGUSR1)
    (tmp_path / "sent").touch()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, printed
