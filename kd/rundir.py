"""The run directory: one folder per run, of one config, that the same command resumes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd.checkpoint import write_atomic
from kd.parallel import World
from kd.types import UserError

# What may change between a run and its continuation: none of it changes what is computed.
# The split of a global batch over ranks may, too: `train.global_batch_size` is compared instead.
FREE_KEYS = (
    "run.dir",
    "run.resume",
    "parallel.nproc",
    "parallel.dp_replicate",
    "parallel.device",
    "parallel.activation_checkpointing",
    "parallel.sync_every_micro_batch",
    "parallel.cpu_offload",
    "parallel.cpu_threads",
    "parallel.timeout_s",
    "logger",
    "checkpoint.keep_last",
    "checkpoint.save_async",
    "doctor",
    "profile",
    "profile_steps",
    "traceback",
    "teacher.cpu_offload",
    "teacher.offload",
    "target.cpu_offload",
    "loss.chunk_mib",
    "teacher.urls",
    "teacher.ahead",
    "teacher.rows_per_request",
    "teacher.max_concurrency",
    "teacher.timeout_s",
    "teacher.retries",
    "teacher.wait_s",
    "data.num_workers",
    "data.datasets.*.num_workers",  # not read: that of the mixture is
    "train.micro_batch_size",
    "train.grad_accum",
    "batching",
    "train.log_every",
    "train.save_every",
    # What is made of a finished run.
    "student.lora.export",
    # Where the teacher's word is kept.
    "teacher.folder",
    "teacher.require_full",
    # Where and how rollouts are made, but not which weights make them.
    "rollout.engine.gather",
    "rollout.engine.token_budget",
    "rollout.engine.urls",
    "rollout.engine.transfer",
    "rollout.engine.model",
    "rollout.engine.max_concurrency",
    "rollout.engine.timeout_s",
    "rollout.engine.retries",
    "rollout.engine.wait_s",
)


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = ""
    """Folder of the run below `dir`."""
    dir: str = "runs"
    seed: int = 0
    resume: bool = True
    """False: refuse a folder that already holds a run."""

    def validate(self) -> None:
        """Refuse names that are no folder below `dir`."""
        path = Path(self.name)
        if path == Path() or path.is_absolute() or ".." in path.parts:
            raise UserError(f"run.name={self.name!r}: give the name of a folder below run.dir")
        if self.seed < 0:
            raise UserError(f"run.seed={self.seed}: must be 0 or more")

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.dir) / self.name


class RunDir:
    """`runs/<name>/`, shared by all ranks; rank 0 writes."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self._started = time.monotonic()
        self._wall_before_s = 0.0
        self._device_before_s = 0.0

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of the exported model."""
        return self.path / "export"

    def open(self, config: dict[str, Any], overrides: list[str], resume: bool) -> None:
        """Create the folder or re-open it for the same config; every rank gets the same answer."""
        problem = None
        if self.world.is_main:
            try:
                self._open(config, overrides, resume)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"cannot write the run directory {self.path}: {error.strerror}"
        self.world.agree(problem)

    def _open(self, config: dict[str, Any], overrides: list[str], resume: bool) -> None:
        saved = self.path / "config.yaml"
        text = OmegaConf.to_yaml(OmegaConf.create(config))
        if saved.exists() and self._has_begun():
            if not resume:
                raise UserError(
                    f"{self.path} holds a run already and run.resume=false: "
                    "choose another run.name, or remove the folder"
                )
            # Both as they read from YAML, where an enum and its name are the same.
            differing = differences(_flat(_from_yaml(saved.read_text())), _flat(_from_yaml(text)))
            if differing:
                raise UserError(
                    f"{self.path} holds a run of another config: {'; '.join(differing)}\n"
                    "Choose another run.name, or remove the folder"
                )
            status = self.read_status()
            self._wall_before_s = status.get("wall_s", 0.0)
            self._device_before_s = status.get("device_s", 0.0)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(saved, text)
        write_atomic(self.path / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))

    def _has_begun(self) -> bool:
        """Whether there is anything to lose: a step, or a checkpoint."""
        return (self.path / "metrics.jsonl").exists() or any(self.checkpoints.glob("step_*"))

    def read_status(self) -> dict[str, Any]:
        """What `write_status` wrote last; empty for a new run."""
        path = self.path / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_status(self, status: str, step: int) -> None:
        """Say how far the run is: running, finished, stopped or failed."""
        if self.world.is_main:
            here_s = time.monotonic() - self._started
            content = {
                "status": status,
                "step": step,
                "wall_s": round(self._wall_before_s + here_s, 1),
                "device": self.world.device.type,
                "device_s": round(self._device_before_s + here_s * self.world.size, 1),
            }
            write_atomic(self.path / "status.json", json.dumps(content))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key that changes what a run computes."""
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(fnmatchcase(key, free) or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]


def _from_yaml(text: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
