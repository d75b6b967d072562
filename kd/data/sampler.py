"""Which row goes where.

The rows form one endless stream: a permutation per epoch, one after the other. With micro-batches
of b rows on W ranks, micro-step m of rank r takes slots [(m W + r) b, (m W + r + 1) b) of it, so
an optimizer step reads the same rows however the global batch is split over ranks, micro-batch and
accumulation, and the whole state is one integer: the slots handed out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """One rank's part of the stream: `micro_batch_size` rows at a time on `rank` of `world`."""

    micro_batch_size: int
    rank: int = 0
    world: int = 1

    @property
    def stride(self) -> int:
        """Slots that all ranks together take in a micro-step."""
        return self.micro_batch_size * self.world


class TrainSampler:
    """Endless lists of row numbers, from slot `position` on (shuffled by `seed` and epoch)."""

    def __init__(self, num_rows: int, split: Split, *, seed: int, shuffle: bool, position: int):
        self.num_rows, self.split = num_rows, split
        self.seed, self.shuffle, self.position = seed, shuffle, position
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.position + self.split.rank * self.split.micro_batch_size
        while True:
            yield [self.row(slot) for slot in range(first, first + self.split.micro_batch_size)]
            first += self.split.stride

    def row(self, slot: int) -> int:
        """The row in a slot of the endless stream."""
        epoch, place = divmod(slot, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return int(self._order[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)


class ValidationSampler:
    """Every row once over all ranks; as many lists on every rank, the last ones short or empty."""

    def __init__(self, num_rows: int, split: Split):
        self.num_rows, self.split = num_rows, split

    def __len__(self) -> int:
        return -(-self.num_rows // self.split.stride)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.split.micro_batch_size
        for step in range(len(self)):
            first = step * self.split.stride + self.split.rank * size
            yield list(range(first, min(first + size, self.num_rows)))
