"""Sums over micro-batches and ranks, kept on the device and read once per step."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

    @classmethod
    def split(cls, numbers: list[int]) -> tuple[Counts, list[int]]:
        """Counts that others follow, and these."""
        size = len(cls._fields)
        return cls(*numbers[:size]), numbers[size:]

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


@dataclass(frozen=True)
class Datasets:
    """The data sets of a mixture, whose losses are told apart; no names: there is no mixture.

    Counts and sums are flat lists of two numbers for each, of CE and of KD.
    """

    names: list[str]
    """The same on all ranks, whatever rows they see."""

    def counts(self, batches: list[Batch]) -> list[int]:
        """Targets and KD targets, known on the host."""
        if not self.names:
            return []
        found: Counter[tuple[str, str]] = Counter()
        for batch in batches:
            counts = batch.targets_by_rollout, batch.kd_targets_by_rollout
            for sample, targets, kd_targets in zip(batch.samples, *counts, strict=True):
                found[sample.dataset, "ce"] += targets
                found[sample.dataset, "kd"] += kd_targets
        return [found[name, term] for name in self.names for term in ("ce", "kd")]

    def sums(self, batch: Batch, out: KDOutput) -> Tensor:
        """CE and KD summed over the targets of a micro-batch, without a host sync."""
        which = [self.names.index(sample.dataset) for sample in batch.samples]
        device = out.ce_N.device
        # Few numbers: the host would wait for a longer copy of memory that is not pinned.
        spans = torch.tensor([which, batch.targets_by_rollout], dtype=torch.int64)
        which_B, lengths_B = spans.to(device, non_blocking=True)
        which_N = which_B.repeat_interleave(lengths_B, output_size=len(out.ce_N))
        other_MN = which_N != torch.arange(len(self.names), device=device)[:, None]
        losses_2N = torch.stack([out.ce_N, out.kd_N])
        # Not a product with 0 and 1: one data set's infinity would be another's NaN.
        return losses_2N.masked_fill(other_MN[:, None], 0).sum(-1).double().flatten()

    def metrics(
        self, split: str, kd_ratio: float, counts: list[int], sums: list[float]
    ) -> dict[str, float]:
        """Loss, CE and KD per target, of counts and sums over all ranks; none without targets."""
        found: dict[str, float] = {}
        numbers = iter(zip(counts, sums, strict=True))
        for name, (targets, ce), (kd_targets, kd) in zip(self.names, numbers, numbers, strict=True):
            if targets == 0:
                continue
            ce, kd = ce / targets, kd / max(1, kd_targets)
            found |= {f"{split}/loss_{name}": mix(ce, kd, kd_ratio), f"{split}/ce_{name}": ce}
            if kd_targets:
                found[f"{split}/kd_{name}"] = kd
        return found


class LossSum:
    """loss, CE and KD summed over micro-batches; each part is already divided by the targets.

    Of data sets CE and KD, not divided.
    """

    def __init__(self, device: torch.device, datasets: Datasets) -> None:
        self.datasets = datasets
        self.sums = torch.zeros(3 + 2 * len(datasets.names), device=device, dtype=torch.float64)

    def add(self, batch: Batch, out: KDOutput) -> None:
        """Count one micro-batch, without a host sync."""
        self.sums[:3].add_(torch.stack([out.loss.detach(), out.ce, out.kd]).double())
        if self.datasets.names:
            self.sums[3:].add_(self.datasets.sums(batch, out))

    def reduce(self, world: World, *extra: Tensor) -> list[float]:
        """[loss, ce, kd, *extra, *sums of data sets], over all ranks but extra; one host sync."""
        sums = world.sum(self.sums)
        scalars = (x.detach().to(sums).reshape(1) for x in extra)  # one of the host, if offloaded
        return torch.cat([sums[:3], *scalars, sums[3:]]).tolist()


def mix(ce: float, kd: float, kd_ratio: float) -> float:
    """The loss; an endpoint drops the other term, which 0 * inf would not."""
    if kd_ratio in (0, 1):
        return kd if kd_ratio else ce
    return (1 - kd_ratio) * ce + kd_ratio * kd


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


def memory(device: torch.device) -> dict[str, float]:
    """`train/…` of the peak so far. Of a GPU also what its allocator held at most, used or not, and
    how often it found no room and had to give back what it held, which waits for the GPU.
    """
    found = {"train/peak_mem_gib": peak_mem_gib(device)}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        found["train/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
        found["train/alloc_retries"] = stats["num_alloc_retries"]
    return found


def peak_mem_gib(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
