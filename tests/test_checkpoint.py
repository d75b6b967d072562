"""Background saves: what they do apart from training, and what becomes of their errors."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import kd.checkpoint
from kd.checkpoint import CheckpointConfig, Checkpoints, verify
from kd.parallel import ParallelConfig, World
from tests.distributed.test_ranks import TORCHRUN
from tests.processes import completed, environment

Made = tuple[World, Checkpoints, nn.Module, torch.optim.Optimizer]


@pytest.fixture
def made(tmp_path):
    """Checkpoints of a small model with an optimizer that has moments."""
    world = ParallelConfig(device="cpu").build()
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, world, CheckpointConfig(keep_last=1))
    yield world, checkpoints, model, optimizer
    checkpoints.close()
    world.close()


def test_a_save_holds_the_step_it_names_and_its_sums_are_made_beside_training(made, monkeypatch):
    """While the sums wait, training goes on, and the checkpoint before stays."""
    _, checkpoints, model, optimizer = made
    checkpoints.save(1, model, optimizer, {})
    checkpoints.finish()
    before = model.weight.detach().clone()
    summed, may_go_on, plain = [], threading.Event(), kd.checkpoint._checksum

    def checksum(path: Path) -> list[int]:
        assert may_go_on.wait(60)
        summed.append(threading.current_thread())
        return plain(path)

    monkeypatch.setattr(kd.checkpoint, "_checksum", checksum)
    checkpoints.save(2, model, optimizer, {})
    with torch.no_grad():
        model.weight.zero_()
    checkpoints.poll()
    assert checkpoints.steps() == [1] and verify(checkpoints.path(1)) is None
    may_go_on.set()
    checkpoints.finish()
    assert checkpoints.steps() == [2] and verify(checkpoints.path(2)) is None
    assert len(summed) >= 4 and threading.main_thread() not in summed
    checkpoints.load(2, model, optimizer)
    assert torch.equal(model.weight, before)


def test_an_error_of_a_background_save_is_raised_by_the_next_step(made, monkeypatch):
    _, checkpoints, model, optimizer = made
    checkpoints.save(1, model, optimizer, {})
    checkpoints.finish()
    monkeypatch.setattr(kd.checkpoint, "_checksum", refuse)
    checkpoints.save(2, model, optimizer, {})
    with pytest.raises(OSError, match="no space"):
        for _ in range(600):
            checkpoints.poll()
            threading.Event().wait(0.1)
    assert checkpoints.steps() == [1], "older ones go when a newer one is whole"
    monkeypatch.undo()
    checkpoints.save(3, model, optimizer, {})
    checkpoints.finish()
    assert checkpoints.steps() == [3] and not list(checkpoints.folder.glob(".partial_*"))


def refuse(path: Path) -> list[int]:
    """Stands for a disk that is full: a real one would have to be filled."""
    raise OSError(28, "no space left", str(path))


def test_a_run_that_fails_lets_its_save_end(made, monkeypatch, caplog):
    _, checkpoints, model, optimizer = made
    checkpoints.save(1, model, optimizer, {})
    checkpoints.close()
    assert verify(checkpoints.path(1)) is None
    again = Checkpoints(checkpoints.folder, checkpoints.world, checkpoints.config)
    monkeypatch.setattr(kd.checkpoint, "_checksum", refuse)
    again.save(2, model, optimizer, {})
    with caplog.at_level(logging.WARNING):
        again.close()
    assert "the last checkpoint could not be written" in caplog.text


ON_RANKS = """
import sys
from pathlib import Path
import torch
from torch import nn
import kd.checkpoint
from kd.checkpoint import CheckpointConfig, Checkpoints, verify
from kd.parallel import ParallelConfig
from tests.test_checkpoint import refuse

world = ParallelConfig(device="cpu", cpu_threads=1).build()
model = nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
for mode in ("async", "now"):
    folder = Path(sys.argv[1]) / mode
    if world.is_main:
        folder.mkdir()
    world.barrier()
    checkpoints = Checkpoints(folder, world, CheckpointConfig(save_async=mode == "async"))
    checkpoints.save(1, model, optimizer, {})
    checkpoints.finish()
    plain = kd.checkpoint._checksum
    if world.rank == 1:
        kd.checkpoint._checksum = refuse
    try:
        checkpoints.save(2, model, optimizer, {})
        while checkpoints._pending is not None:
            checkpoints.poll()
    except OSError as error:
        print(f"rank {world.rank} {mode}: {error.strerror}", flush=True)
    kd.checkpoint._checksum = plain
    assert checkpoints.steps() == [1]
    checkpoints.save(3, model, optimizer, {})
    checkpoints.finish()
    world.barrier()
    assert checkpoints.steps() == [1, 3] and verify(checkpoints.path(3)) is None
    checkpoints.close()
world.close()
"""


def test_an_error_on_one_rank_is_raised_on_all(tmp_path, repo):
    (tmp_path / "run.py").write_text(ON_RANKS)
    command = [*TORCHRUN, "--nproc-per-node", "2", tmp_path / "run.py", tmp_path]
    done = completed(*command, env=environment(PYTHONPATH=str(repo)))
    assert done.returncode == 0, done.tail()
    for rank in (0, 1):
        for mode in ("async", "now"):
            assert f"rank {rank} {mode}: no space left" in done.stdout
    small = json.loads((tmp_path / "async" / "step_000003" / "small.json").read_text())
    assert small["step"] == 3
