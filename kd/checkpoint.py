"""Checkpoints that are whole or absent, and the exported model.

`checkpoints/step_000100/` holds the sharded weights and optimizer state (torch.distributed
.checkpoint: any number of ranks can read them), one JSON file per rank with its random state, one
with everything small, and a manifest with the size and CRC of every file. It is written under
a temporary name, flushed to the disk, and renamed at last: a kill at any moment leaves the last
whole checkpoint in place.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel, ProcessorMixin

from kd.parallel import World
from kd.types import UserError

log = logging.getLogger("kd")


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
        self._pending: tuple[Future, int] | None = None
        # A gloo group of its own: a background save must not mix its collectives with training's.
        self._group = dist.new_group(backend="gloo") if config.save_async else None
        self._best = self._read_best()

    # ---- writing -------------------------------------------------------------------------------

    def save(self, step: int, student: nn.Module, optimizer: Optimizer, small: dict) -> None:
        """Write the state after `step`; `small` is JSON and the same on every rank."""
        self.finish()
        partial = self.folder / f".partial_{step:06d}"
        if self.world.is_main:
            self._sweep_partial()
            (partial / "random").mkdir(parents=True)
        self.world.barrier()
        (partial / "random" / f"rank_{self.world.rank:05d}.json").write_text(random_state())
        if self.world.is_main:
            (partial / "small.json").write_text(json.dumps({"step": step, **small}, indent=1))
        state = _state(student, optimizer)
        if not self.config.save_async:
            dcp.save(state, checkpoint_id=partial / "state")
            self._commit(step)
            return
        # Staged here and now: training goes on with these very tensors.
        staged = {"state": _cpu_copy(state)}
        future = dcp.async_save(
            staged["state"], checkpoint_id=partial / "state", process_group=self._group
        )
        self._pending = (cast(Future, future), step)

    def finish(self) -> None:
        """Wait for a background save and make it visible."""
        if self._pending is not None:
            future, step = self._pending
            self._pending = None
            future.result()
            self._commit(step)

    def _commit(self, step: int) -> None:
        self.world.barrier()
        if self.world.is_main:
            partial = self.folder / f".partial_{step:06d}"
            _write_manifest(partial)
            final = self.path(step)
            if final.exists():  # of a run that was rewound: the new one replaces it
                shutil.rmtree(final)
            os.rename(partial, final)
            _fsync(self.folder)
            if self._best is not None:
                write_atomic(self.folder / "best.json", json.dumps(self._best))
            self._prune()
        self.world.barrier()

    def record_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether `best_metric` has improved; the caller then saves this very step."""
        name = self.config.best_metric
        if name is None:
            return False
        if name not in metrics:
            raise UserError(
                f"checkpoint.best_metric={name} is not among the validation metrics: "
                + ", ".join(sorted(metrics))
            )
        value = metrics[name]
        sign = 1 if self.config.best_mode == "min" else -1
        improved = self._best is None or sign * value < sign * self._best["value"]
        if improved:
            self._best = {"step": step, "metric": name, "value": value}
        return improved

    def _read_best(self) -> dict[str, Any] | None:
        path = self.folder / "best.json"
        best = json.loads(path.read_text()) if path.exists() else None
        return best if best and best["metric"] == self.config.best_metric else None

    def _sweep_partial(self) -> None:
        for leftover in self.folder.glob(".partial_*"):
            shutil.rmtree(leftover)

    def _prune(self) -> None:
        steps = self.steps()
        keep = set(steps[-self.config.keep_last :])
        if self._best is not None:
            keep.add(self._best["step"])
        for step in steps:
            if step not in keep:
                shutil.rmtree(self.path(step))

    # ---- reading -------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step`."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*"))

    def best_step(self) -> int | None:
        """The step kept as best by validation."""
        return self._best["step"] if self._best else None

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
        state = _state(student, optimizer)
        dcp.load(state, checkpoint_id=path / "state")
        set_state_dict(
            student,
            optimizer,
            model_state_dict=state["student"],
            optim_state_dict=state["optimizer"],
        )
        mine = path / "random" / f"rank_{self.world.rank:05d}.json"
        if mine.exists():  # absent where the run went on with more ranks
            set_random_state(mine.read_text())
        return json.loads((path / "small.json").read_text())


def _state(student: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    student_state, optimizer_state = get_state_dict(student, optimizer)
    return {"student": student_state, "optimizer": optimizer_state}


def _cpu_copy(state: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, state
    )


# ---- manifest ----------------------------------------------------------------------------------


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _fsync(path)
    manifest = {str(p.relative_to(folder)): [p.stat().st_size, _crc(p)] for p in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _fsync(folder / "manifest.json")


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


# ---- export ------------------------------------------------------------------------------------


def export(
    folder: Path,
    root: nn.Module,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    world: World,
    dtype: str,
) -> None:
    """Write `model` (held by `root`) and its processor as a Hugging Face folder, atomically."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(root, options=options)  # on rank 0; empty elsewhere
    if world.is_main:
        partial = folder.with_name(f".partial_{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        target = getattr(torch, dtype)
        prefix = "model."  # the attribute of the root that holds the model
        weights = {
            name.removeprefix(prefix): value.to(target) if value.is_floating_point() else value
            for name, value in state.items()
        }
        model.config.dtype = target
        model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        old = folder.with_name(f".old_{folder.name}")
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()
