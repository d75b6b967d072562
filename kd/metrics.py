"""Sums over micro-batches and ranks, kept on the device and read once per step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kd.objective import KDOutput
from kd.parallel import World


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
        return torch.cat([sums, *(x.detach().double().reshape(1) for x in extra)]).tolist()


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
        """Add the time of the block to `name`."""
        start = self._now()
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
