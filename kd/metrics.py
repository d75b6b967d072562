"""Sums over micro-batches and ranks, kept on the device and read once per step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from kd.objective import KDOutput
from kd.parallel import World
from kd.types import Batch


class Counts(NamedTuple):
    """What the micro-batches of an optimizer step hold, on a rank or on all."""

    targets: int
    kd_targets: int
    aligned: int
    unaligned: int
    tokens: int
    places: int

    @classmethod
    def of(cls, batches: list[Batch]) -> Counts:
        """Of a rank's micro-batches."""
        return cls(
            sum(b.num_targets for b in batches),
            sum(b.num_kd_targets for b in batches),
            sum(b.num_aligned for b in batches),
            sum(b.num_unaligned for b in batches),
            sum(b.num_tokens for b in batches),
            sum(b.num_places for b in batches),
        )

    @property
    def divisors(self) -> tuple[int, int]:
        """What the CE and the KD of every micro-batch of the step are divided by."""
        return max(1, self.targets), max(1, self.kd_targets)

    def metrics(self) -> dict[str, float]:
        """Of all ranks."""
        return {
            "train/num_targets": self.targets,
            "data/padding_waste": 1 - self.tokens / max(1, self.places),
            "align/coverage": self.aligned / max(1, self.targets),
            "align/unaligned": self.unaligned,
        }


class LossSum:
    """loss, CE and KD summed over micro-batches; each part is already divided by the targets."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, out: KDOutput) -> None:
        """Count one micro-batch, without a host sync."""
        self.sums += torch.stack([out.loss.detach(), out.ce, out.kd]).double()

    def reduce(self, world: World, *extra: Tensor) -> list[float]:
        """[loss, ce, kd, *extra]: sums over all ranks, and the extra scalars; one host sync."""
        sums = world.sum(self.sums)
        scalars = (x.detach().to(sums).reshape(1) for x in extra)  # one of the host, if offloaded
        return torch.cat([sums, *scalars]).tolist()


class Timer:
    """Seconds spent in named parts of a step: on a GPU the stream's own time, else the host's."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    def _now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`, which a profiler will see, too."""
        start = self._now()
        with record_function(f"kd::{name}"):
            yield
        self.marks.append((name, start, self._now()))

    def flush(self) -> dict[str, float]:
        """Seconds per name since the last flush; waits for a GPU to reach the last mark."""
        seconds: dict[str, float] = {}
        if self.marks and isinstance(self.marks[-1][2], torch.cuda.Event):
            self.marks[-1][2].synchronize()
        for name, start, end in self.marks:
            if isinstance(start, float) or isinstance(end, float):
                elapsed_s = float(end) - float(start)  # type: ignore[arg-type]
            else:
                elapsed_s = start.elapsed_time(end) / 1000
            seconds[name] = seconds.get(name, 0.0) + elapsed_s
        self.marks.clear()
        return seconds


def peak_mem_gib(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
