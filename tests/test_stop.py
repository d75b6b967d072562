"""SIGUSR1: a checkpoint after the step, exit code 75, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kd.checkpoint import verify
from kd.stop import EXIT_CODE, children, stop_request
from tests.conftest import FAST, metrics
from tests.processes import LIMIT_S, join, python, started

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
ends = time.monotonic() + 300
while not stop_request.asked and time.monotonic() < ends:
    time.sleep(0.02)
if stop_request.asked:
    raise Stopped
"""


def outcomes(run: Path) -> list[dict[str, float]]:
    """All metrics, as logged, but those of speed and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("_s", "_gib")
    return [{k: v for k, v in row.items() if not k.endswith(measured)} for row in rows]


def test_stopped_and_started_again_equals_never_having_stopped(train, tmp_path):
    """In this process; with several ranks and a batch system: scripts/test_slurm.sh."""
    options = ["student=digits_small", "train.max_steps=20", "data.num_workers=0", "doctor=never"]
    run = tmp_path / "runs" / "stopped"

    def ask() -> None:
        ends = time.monotonic() + LIMIT_S
        while not (run / "metrics.jsonl").exists() and time.monotonic() < ends:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGUSR1)

    whole = outcomes(train("digits_teacher", "whole", *options))
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with pytest.raises(SystemExit) as ended:
            train("digits_teacher", "stopped", *options)
    finally:
        join(asking)
        stop_request.asked = False  # as in a new process
    assert ended.value.code == EXIT_CODE
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    before = (run / "metrics.jsonl").read_text()
    assert 0 < len(before.splitlines()) < 20
    train("digits_teacher", "stopped", *options)
    assert (run / "metrics.jsonl").read_text().startswith(before)  # no step was done again
    assert outcomes(run) == whole


def test_one_rank_that_is_told_stops_all_after_the_same_step(tmp_path):
    run = tmp_path / "run"
    options = [f"run.dir={tmp_path}", "run.name=run", *FAST, *RUN]
    with started(*python("-m", "kd.run", "--config-name", "digits_teacher", *options)) as process:
        process.wait_for((run / "metrics.jsonl").exists)
        os.kill(max(children(process.pid)), signal.SIGUSR1)  # the rank started last
        process.wait()
    assert (process.returncode, process.stderr) == (EXIT_CODE, "")
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped" and 0 < status["step"] < 99
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{status['step']:06d}" and verify(checkpoint) is None
    assert max(metrics(run, "train/loss")) == status["step"]


def test_torchrun_passes_it_on_also_before_the_ranks_listen(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    options = ["--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path)]
    with started(*python("-m", "kd.torchrun", *options)) as process:
        process.wait_for(lambda: Path(tmp_path, "0").exists() and Path(tmp_path, "1").exists())
        os.kill(process.pid, signal.SIGUSR1)
        (tmp_path / "sent").touch()
        assert process.wait() == EXIT_CODE, process.tail()
