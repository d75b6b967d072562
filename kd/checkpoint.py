"""Checkpoints that are whole or absent.

`checkpoints/step_000100/` holds the sharded weights that are trained and the optimizer state
(torch.distributed.checkpoint: any number of ranks can read them), one JSON file per rank with its
random state, one with everything small, and a manifest with the size and CRC of every file. Frozen
weights come from where the student comes from; only a sum of them is kept, to know them by. It is
written under a temporary name, flushed to the disk, and renamed at last: a kill at any moment
leaves the last whole checkpoint in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
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


@dataclass
class Best:
    """The best step so far by `metric`; it travels inside the checkpoints."""

    step: int
    metric: str
    mode: str
    value: float


@dataclass
class _Pending:
    future: Future
    step: int
    best: Best | None


@dataclass
class CheckpointConfig:
    """Which checkpoints are kept and how they are written."""

    keep_last: int = 2
    """The newest so many are kept."""
    best_metric: str | None = None
    """E.g. val/loss or val/accuracy: the checkpoint that is best by it is kept as well."""
    best_mode: str = "min"
    """min or max."""
    save_async: bool = False
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
        self._pending: _Pending | None = None
        # A gloo group of its own: a background save must not mix its collectives with training's.
        self._group = dist.new_group(backend="gloo") if config.save_async else None
        self._best: Best | None = None

    # ---- writing -------------------------------------------------------------------------------

    def save(self, step: int, student: nn.Module, optimizer: Optimizer, small: dict) -> None:
        """Write the state after `step`; `small` is JSON and the same on every rank.

        Raises OSError where the disk refuses.
        """
        self.finish()
        partial = self._partial(step)
        state, frozen = _state(student, optimizer)
        if self.world.is_main:
            for leftover in self.folder.glob(".partial_*"):
                shutil.rmtree(leftover)
            (partial / "random").mkdir(parents=True)
        self.world.barrier()
        (partial / "random" / f"rank_{self.world.rank:05d}.json").write_text(random_state())
        if self.world.is_main:
            best = None if self._best is None else dataclasses.asdict(self._best)
            small = {"step": step, "best": best, "frozen": frozen, **small}
            (partial / "small.json").write_text(json.dumps(small, indent=1))
        if self.config.save_async:
            future = dcp.async_save(
                _own_copy(state), checkpoint_id=partial / "state", process_group=self._group
            )
            self._pending = _Pending(cast(Future, future), step, self._best)
        else:
            with _plain_errors(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                # One rank needs no collectives, whose thread slows later steps (see World.gather).
                dcp.save(state, checkpoint_id=partial / "state", no_dist=self.world.size == 1)
            self._commit(step, self._best)

    def poll(self) -> None:
        """Make a background save visible as soon as every rank has written its part."""
        if self._pending is not None:
            (unfinished,) = self.world.sum_ints(not self._pending.future.done())
            if not unfinished:
                self.finish()

    def finish(self) -> None:
        """Wait for a background save and make it visible."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with _plain_errors():
                pending.future.result()
            self._commit(pending.step, pending.best)

    def _commit(self, step: int, best: Best | None) -> None:
        self.world.barrier()
        partial = self._partial(step)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        mine = files[self.world.rank :: self.world.size]  # reading them all is work: shared
        sums = {str(path.relative_to(partial)): _checksum(path) for path in mine}
        manifest = {name: s for rank in self.world.gather(sums) for name, s in rank.items()}
        if self.world.is_main:
            write_atomic(partial / "manifest.json", json.dumps(manifest, indent=1))
            final = self.path(step)
            if final.exists():  # damaged, or it would have been resumed from
                shutil.rmtree(final)
            os.rename(partial, final)
            _fsync(self.folder)
            self._prune(step, best)
        self.world.barrier()

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


def _own_copy(state: Any) -> Any:
    """Tensors that training will not change: what lies on a GPU is copied when it is staged."""
    return torch.utils._pytree.tree_map(
        lambda x: x.detach().clone() if isinstance(x, torch.Tensor) and x.is_cpu else x, state
    )


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
