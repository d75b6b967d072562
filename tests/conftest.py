"""Runs of the real recipe, in this process, on tiny models of the real architecture."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from kd import run as kd_run

pytest_plugins = ["tests.hangs"]

# Small enough for seconds, real enough to learn: the digits student on few rows.
FAST = [
    "train.max_steps=6",
    "train.micro_batch_size=4",
    "train.log_every=1",
    "train.val_every=null",
    "data.val_samples=10",
    "optim.warmup_steps=2",
    "parallel.cpu_threads=1",
]


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kd_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`python -m kd.run` in this process: raises SystemExit where the command would."""

    def main(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["kd.run", *args])
        GlobalHydra.instance().clear()
        random.seed(0)
        kd_run.main()

    return main


@pytest.fixture
def train(kd_main: Callable[..., None], tmp_path: Path) -> Callable[..., Path]:
    """Run a config below `tmp_path/runs`; returns the run directory."""

    def run(config: str, name: str, *overrides: str, fast: bool = True) -> Path:
        base = [f"run.dir={tmp_path / 'runs'}", f"run.name={name}", "logger=jsonl"]
        kd_main("--config-name", config, *(FAST if fast else []), *base, *overrides)
        return tmp_path / "runs" / name

    return run


def metrics(run_dir: Path, key: str) -> dict[int, float]:
    """`{step: value}` of one metric of a run."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return Path(__file__).parents[1]
