"""Which row goes where.

The rows form one endless stream: a permutation per epoch, one after the other. With micro-batches
of b rows on W ranks, micro-step m of rank r takes slots [(m W + r) b, (m W + r + 1) b) of it, so
an optimizer step reads the same rows however the global batch is split over ranks, micro-batch and
accumulation, and the whole state is one integer: the slots handed out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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


class Order(Protocol):
    """Which row is in which slot of the endless stream."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        ...

    def row(self, slot: int) -> int:
        """The row in a slot."""
        ...

    def metrics(self, position: int) -> dict[str, float]:
        """What the first `position` slots were made of; nothing where there is no choice."""
        ...


class Epochs:
    """A permutation of the rows per epoch, one after the other, by `seed` and epoch."""

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool, stream: tuple[int, ...] = ()):
        self.num_rows, self.seed, self.shuffle, self.stream = num_rows, seed, shuffle, stream
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, slot: int) -> int:
        """The row in a slot of the endless stream."""
        epoch, place = divmod(slot, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return int(self._order[place])

    def metrics(self, position: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, epoch, *self.stream]).permutation(self.num_rows)


class TrainSampler:
    """Endless lists of row numbers, from slot `position` on."""

    def __init__(self, order: Order, split: Split, *, position: int):
        self.order, self.split, self.position = order, split, position

    def __iter__(self) -> Iterator[list[int]]:
        size = self.split.micro_batch_size
        first = self.position + self.split.rank * size
        while True:
            yield [self.order.row(slot) for slot in range(first, first + size)]
            first += self.split.stride


class ValidationSampler:
    """Every row once over all ranks; as many lists on every rank, the last ones short or empty.

    `sizes` are those of data sets that follow each other: no list has rows of two of them.
    """

    def __init__(self, sizes: list[int], split: Split):
        self.sizes, self.split = sizes, split

    def __len__(self) -> int:
        return sum(-(-size // self.split.stride) for size in self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        start, rows = 0, self.split.micro_batch_size
        for size in self.sizes:
            end = start + size
            for step in range(start, end, self.split.stride):  # as many on every rank
                first = step + self.split.rank * rows
                yield list(range(first, min(first + rows, end)))
            start = end
