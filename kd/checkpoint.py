"""Checkpoints that are whole or absent.

`checkpoints/step_000100/` holds the sharded weights that are trained and the optimizer state
(torch.distributed.checkpoint: any number of ranks can read them), one JSON file per rank with its
random state, one with everything small, and a manifest with the size and CRC of every file. Frozen
weights come from where the student comes from; only a sum of them is kept, to know them by. It is
written under a temporary name, flushed to the disk, and renamed at last: a kill at any moment
leaves the last whole checkpoint in place. Training goes on meanwhile (`save_async`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.optim import Optimizer

from kd.parallel import World, local
from kd.types import UserError

log = logging.getLogger("kd")
T = TypeVar("T")


@dataclass
class Best:
    """The best step so far by `metric`; it travels inside the checkpoints."""

    step: int
    metric: str
    mode: str
    value: float


@dataclass
class CheckpointConfig:
    """Which checkpoints are kept and how they are written."""

    keep_last: int = 2
    """The newest so many are kept."""
    best_metric: str | None = None
    """E.g. val/loss or val/accuracy: the checkpoint that is best by it is kept as well."""
    best_mode: str = "min"
    """min or max."""
    save_async: bool = True
    """Write in the background while training goes on; costs a copy in host memory."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last={self.keep_last}: keep at least one")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"checkpoint.best_mode={self.best_mode}: use min or max")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig) -> None:
        self.folder = folder
        self.world = world
        self.config = config
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=self._use_device)
        # A gloo group of its own: a background save must not mix its collectives with training's.
        apart = config.save_async and world.size > 1
        self._group = dist.new_group(backend="gloo") if apart else None
        self._best: Best | None = None

    # ---- writing -------------------------------------------------------------------------------

    def save(self, step: int, student: nn.Module, optimizer: Optimizer, small: dict) -> None:
        """Write the state after `step`; `small` is JSON and the same on every rank. Collective.

        In the background if the config says so: then it waits for the save before, and for a copy.
        Raises OSError, on all ranks, where the disk of one refuses, also during the save before.
        """
        self.finish()
        state, frozen = _state(student, optimizer)
        best = None if self._best is None else dataclasses.asdict(self._best)
        text = json.dumps({"step": step, "best": best, "frozen": frozen, **small}, indent=1)
        write = functools.partial(self._write, step, self._best, random_state(), text)
        if self.config.save_async:
            self._pending = self._thread.submit(write, _host_copy(state))
        else:
            write(state)

    def poll(self) -> None:
        """See whether a background save has ended on every rank; raise what it has met."""
        if self._pending is not None:
            (unfinished,) = self.world.sum_ints(not self._pending.done())
            if not unfinished:
                self.finish()

    def finish(self) -> None:
        """Wait for a background save; raise what it has met."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Let a background save end. Of a run that fails otherwise, what it meets is a warning."""
        try:
            self.finish()
        except Exception as error:
            log.warning("the last checkpoint could not be written: %s", error)
        self._thread.shutdown()

    def _use_device(self) -> None:
        """The current device is one per thread: without this, every rank would use GPU 0."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)

    def _write(
        self, step: int, best: Best | None, random: str, small: str, state: dict[str, Any]
    ) -> None:
        """From the first file to the removal of older checkpoints. Collective."""
        partial, alone = self._partial(step), self.world.size == 1
        self._on_all(lambda: self._begin(partial, small) if self.world.is_main else None)
        mine = partial / "random" / f"rank_{self.world.rank:05d}.json"
        self._on_all(lambda: mine.write_text(random))
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        with _plain_errors():
            # One rank needs no collectives, whose thread slows later steps (see World.gather).
            dcp.save(
                state, checkpoint_id=partial / "state", process_group=self._group, no_dist=alone
            )
        sums = self._on_all(lambda: self._checksums(partial))
        manifest = {name: s for rank in sums for name, s in rank.items()}
        self._on_all(lambda: self._publish(step, manifest, best) if self.world.is_main else None)

    def _on_all(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank; an error of one is raised on all. Collective."""
        outcome: T | OSError
        try:
            outcome = work()
        except OSError as error:
            outcome = error
        outcomes = self.world.gather(outcome, self._group)
        for each in outcomes:
            if isinstance(each, OSError):
                raise each
        return outcomes  # type: ignore[return-value]

    def _begin(self, partial: Path, small: str) -> None:
        for leftover in self.folder.glob(".partial_*"):
            shutil.rmtree(leftover)
        (partial / "random").mkdir(parents=True)
        (partial / "small.json").write_text(small)

    def _checksums(self, partial: Path) -> dict[str, list[int]]:
        """Of this rank's share of the files: reading them all is work."""
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        mine = files[self.world.rank :: self.world.size]
        return {str(path.relative_to(partial)): _checksum(path) for path in mine}

    def _publish(self, step: int, manifest: dict[str, list[int]], best: Best | None) -> None:
        partial, final = self._partial(step), self.path(step)
        write_atomic(partial / "manifest.json", json.dumps(manifest, indent=1))
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        os.rename(partial, final)
        _fsync(self.folder)
        self._prune(step, best)

    def _prune(self, newest: int, best: Best | None) -> None:
        # Later steps are damaged ones that a resume has passed over: they keep nothing alive.
        steps = [step for step in self.steps() if step <= newest]
        keep = {*steps[-self.config.keep_last :], *([best.step] if best else [])}
        for step in steps:
            if step not in keep:
                shutil.rmtree(self.path(step))

    def record_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether `best_metric` has improved; the caller then saves this very step."""
        name, mode = self.config.best_metric, self.config.best_mode
        if name is None:
            return False
        if name not in metrics:
            raise UserError(
                f"checkpoint.best_metric={name} is not among the validation metrics: "
                + ", ".join(sorted(metrics))
            )
        value, sign = metrics[name], 1 if mode == "min" else -1
        if not math.isfinite(value):
            return False
        if self._best is not None and sign * value >= sign * self._best.value:
            return False
        self._best = Best(step, name, mode, value)
        return True

    def _partial(self, step: int) -> Path:
        return self.folder / f".partial_{step:06d}"

    # ---- reading -------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step`."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*"))

    def best_step(self) -> int | None:
        """The step kept as best by validation."""
        return self._best.step if self._best else None

    def newest_whole(self) -> int | None:
        """The newest step whose files all match their manifest; damaged ones are named."""
        newest = None
        if self.world.is_main:
            for step in reversed(self.steps()):
                damage = verify(self.path(step))
                if damage is None:
                    newest = step
                    break
                log.warning("checkpoint %s is damaged (%s): skipped", self.path(step).name, damage)
        return self.world.broadcast(newest)

    def load(self, step: int, student: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Put student, optimizer and random state back; returns the small state."""
        path = self.path(step)
        small = json.loads((path / "small.json").read_text())
        state, frozen = _state(student, optimizer)
        if frozen != small["frozen"]:
            self.world.agree(
                f"{path} was saved with other frozen weights, which it does not hold\n"
                "Give the student's folder or revision that the run began with, or another run.name"
            )
        dcp.load(state, checkpoint_id=path / "state")
        # Not strict: the frozen weights stay. What it should hold, `dcp.load` has found in it.
        set_model_state_dict(student, state["student"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(student, optimizer, state["optimizer"])
        mine = path / "random" / f"rank_{self.world.rank:05d}.json"
        if mine.exists():  # absent where the run went on with more ranks
            set_random_state(mine.read_text())
        best = None if small["best"] is None else Best(**small["best"])
        asked = (self.config.best_metric, self.config.best_mode)
        self._best = best if best and (best.metric, best.mode) == asked else None
        return small


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what went wrong on some rank instead of what wraps it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from None


def _state(student: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], int]:
    """What a checkpoint holds: all but frozen weights; and the sum of those. Collective."""
    student_state, optimizer_state = get_state_dict(student, optimizer)
    # Also a tied head, which the option `ignore_frozen_params` leaves.
    named = student.named_parameters(remove_duplicate=False)
    frozen = [student_state.pop(name) for name, p in named if not p.requires_grad]
    return {"student": student_state, "optimizer": optimizer_state}, _sum_of_bits(frozen)


def _sum_of_bits(weights: list[Tensor]) -> int:
    """The same however they are sharded: over the shards of one copy of the model, not of all."""
    if not weights:
        return 0
    # Piece by piece: a sum of int16 in int64 begins by copying all of it as int64.
    pieces = (p for w in weights for p in local(w).view(torch.int16).flatten().split(2**20))
    total = torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()
    if isinstance(weights[0], DTensor):
        placements = [Partial() if isinstance(p, Shard) else p for p in weights[0].placements]
        total = DTensor.from_local(total, weights[0].device_mesh, placements).full_tensor()
    return int(total)


def _host_copy(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors in host memory that training will not change."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        copy = stager.stage(state)
    finally:
        stager.close()
    assert isinstance(copy, dict)
    return copy


# ---- manifest ----------------------------------------------------------------------------------


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _checksum(path: Path) -> list[int]:
    """[size, CRC] of a file that is on the disk for good."""
    _fsync(path)
    return [path.stat().st_size, _crc(path)]


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "no readable manifest"
    for name, (size, crc) in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut short"
        if _crc(path) != crc:
            return f"{name} has changed"
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace the file's content as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _fsync(temporary)
    os.replace(temporary, path)


# ---- random state ------------------------------------------------------------------------------


def random_state() -> str:
    """The process-wide generators (torch, CUDA, numpy, Python) as JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],  # type: ignore[union-attr]
        "python": [version, list(internal), next_gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return json.dumps(state)


def set_random_state(text: str) -> None:
    """Put back what `random_state` gave."""
    state = json.loads(text)
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
