from __future__ import annotations

import io
import itertools
import os
import pty
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from kd.logger import DefaultLoggerConfig
from kd.logger.console import BarLogger, LineLogger, Pace, console_logger
from tests.processes import LIMIT_S

TRAIN = {
    "train/loss": 1.23456,
    "train/ce": 2.0,
    "train/kd": 0.5,
    "train/grad_norm": 0.75,
    "train/lr": 1e-4,
    "train/tokens_per_s": 12345.6,
    "train/step_s": 0.521,
}


def output_to(descriptor: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log a short run as the option `default` does, with `descriptor` as standard output."""
    with os.fdopen(descriptor, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        logger = DefaultLoggerConfig().build(run_dir, rank=0)
        logger.start({}, 4, 0)
        for step in range(1, 5):
            logger.log(step, {"train/loss": 1 / step, "train/tokens_per_s": 1000.0 * step})
        logger.log(4, {"val/accuracy": 0.5})
        logger.close()
        monkeypatch.undo()


def test_lines_without_a_terminal():
    file = io.StringIO()
    logger = console_logger(Console(file=file))
    assert isinstance(logger, LineLogger)
    logger.start({}, 1000, 0)
    logger.log(20, TRAIN)
    logger.log(20, {"val/loss": 1.5, "val/accuracy": 0.83333, "val/accuracy_[red]": 1.0})
    logger.close(failed=True)
    train, val, end = file.getvalue().splitlines()
    assert train.startswith(
        "step 20/1000  loss 1.2346  ce 2.0000  kd 0.5000  grad_norm 0.750  lr 1.00e-04  "
        "12,346 tokens/s  0.52 s/step  left 0:"
    )
    assert val == "step 20/1000  val  loss 1.5  accuracy 0.8333  accuracy_[red] 1"
    assert end.startswith("failed at step 20 after 0:")


def test_metrics_that_are_missing_are_left_out():
    file = io.StringIO()
    logger = console_logger(Console(file=file))
    logger.start({}, 10, 0)
    logger.log(1, {"train/loss": 1.0})
    logger.log(1, {"data/rejected": 3})
    assert file.getvalue().startswith("step 1/10  loss 1.0000  left ")
    assert len(file.getvalue().splitlines()) == 1


def test_line_shows_length_and_cut_share_of_rollouts(rollout):
    file = io.StringIO()
    logger = console_logger(Console(file=file))
    logger.start({}, 10, 0)
    rollouts = {"rollout/length_mean": 41.25, "rollout/truncated": 0.0625, "rollout/eos": 0.9}
    logger.log(1, {"train/loss": 1.0, **rollouts})
    logger.rollouts(1, [rollout()])
    (line,) = file.getvalue().splitlines()
    shown = "step 1/10  loss 1.0000  rollouts 41.2 tokens  6.2% truncated  left "
    assert line.startswith(shown)


def test_bar_on_a_terminal():
    file = io.StringIO()
    logger = console_logger(Console(file=file, force_terminal=True, width=100))
    assert isinstance(logger, BarLogger)
    logger.start({}, 1000, 10)
    logger.log(20, TRAIN)
    logger.log(20, {"val/accuracy_[red]x": 0.25})
    logger.close()
    text = file.getvalue()
    for part in ("step 10/1000", "step 20/1000", "loss 1.2346", "12,346 tokens/s", "left 0:"):
        assert part in text
    assert "\x1b[" in text
    assert "step 20  val  accuracy_[red]x 0.25" in text
    assert "stopped at step 20 after 0:" in text


def test_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(console_logger(console), LineLogger)


def test_time_left_does_not_count_the_warm_up(monkeypatch):
    clock = itertools.chain([0.0, 60.0, 62.0], itertools.repeat(65.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = Pace(total_steps=100, first_step=50)
    assert pace.left_s(51) == 60 * 49  # nothing better is known yet
    assert pace.left_s(52) == 2 * 48
    assert pace.left_s(54) == 5 / 3 * 46
    assert pace.left_s(100) == 0
    assert pace.end(100, failed=False) == "finished at step 100 after 0:01:05"


def test_time_left_follows_the_recent_pace(monkeypatch):
    """A machine that others begin to use: the quick steps of before are forgotten."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    pace = Pace(total_steps=1000, first_step=0)
    for step in range(1, 301):
        clock += 0.1
        left_s = pace.left_s(step)
    assert left_s == pytest.approx(0.1 * 700)
    for step in range(301, 421):
        clock += 2.0
        left_s = pace.left_s(step)
    assert left_s == pytest.approx(2 * 580)
    for step in range(421, 433):  # each longer than the time looked back: at least ten count
        clock += 1000.0
        left_s = pace.left_s(step)
    assert left_s == pytest.approx(1000 * 568)


def test_pipe_gets_no_control_codes_even_with_forced_colour(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    reader, writer = os.pipe()
    output_to(writer, tmp_path, monkeypatch)
    with os.fdopen(reader, "rb") as file:
        output = file.read()
    assert b"\x1b" not in output
    assert output.splitlines()[0].startswith(b"step 1/4  loss 1.0000  1,000 tokens/s")
    assert b"step 4/4  val  accuracy 0.5" in output


def test_real_terminal_gets_the_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    leader, follower = pty.openpty()
    with ThreadPoolExecutor() as pool:  # a terminal that nobody reads blocks its writer
        reading = pool.submit(read_terminal, leader)
        output_to(follower, tmp_path, monkeypatch)
        output = reading.result(LIMIT_S)
    assert b"\x1b[" in output and "━".encode() in output
    assert b"step 4/4" in output and b"step 4  val  accuracy 0.5" in output


def read_terminal(leader: int) -> bytes:
    output = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(leader, 4096):
            output += chunk
    os.close(leader)
    return output
