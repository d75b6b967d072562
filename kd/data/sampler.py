"""Which row goes where.

The rows form one endless stream: a permutation per epoch, one after the other. With micro-batches
of b rows on W ranks, micro-step m of rank r takes slots [(m W + r) b, (m W + r + 1) b) of it, so
an optimizer step reads the same rows however the global batch is split over ranks, micro-batch and
accumulation, and the whole state is one integer: the slots handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

BLOCK_DRAWS, WINDOW_DRAWS = 4, 5
"""Of the seed, beside the streams: what is drawn by it must not hang together."""


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


class BlockEpochs:
    """As `Epochs`, of rows in blocks, of which few are needed at a time.

    Blocks that follow each other in an epoch's order of them make a window of about `window_rows`,
    and its rows are permuted. `expect` is told of the blocks of a window and of the next one.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        seed: int,
        shuffle: bool,
        window_rows: int,
        stream: tuple[int, ...] = (),
        expect: Callable[[np.ndarray], None],
    ):
        self.sizes, self.num_rows = sizes, int(sizes.sum())
        self.first_rows = np.cumsum(sizes) - sizes
        self.seed, self.shuffle, self.stream = seed, shuffle, stream
        self.window_rows, self.expect = window_rows, expect
        self._epoch, self._windows = -1, list[np.ndarray]()
        self._start, self._rows = 0, np.empty(0, dtype=np.int64)

    def row(self, slot: int) -> int:
        """The row in a slot of the endless stream."""
        epoch, place = divmod(slot, self.num_rows)
        if epoch != self._epoch or not 0 <= place - self._start < len(self._rows):
            self._enter(epoch, place)
        return int(self._rows[place - self._start])

    def metrics(self, position: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def _enter(self, epoch: int, place: int) -> None:
        """Have the rows of the window that the place is in."""
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, self._cut(epoch)
        ends = np.cumsum([self.sizes[blocks].sum() for blocks in self._windows])
        number = int(np.searchsorted(ends, place, side="right"))
        blocks = self._windows[number]
        last = number + 1 == len(self._windows)
        following = self._cut(epoch + 1)[0] if last else self._windows[number + 1]
        self.expect(np.concatenate([blocks, following]))
        rows = [self.first_rows[block] + np.arange(self.sizes[block]) for block in blocks]
        self._rows = np.concatenate(rows)
        self._start = int(ends[number]) - len(self._rows)
        if self.shuffle:
            self._rows = self._random(epoch, number, WINDOW_DRAWS).permutation(self._rows)

    def _cut(self, epoch: int) -> list[np.ndarray]:
        """The windows of an epoch: a block is of the one that its first row falls into."""
        order = np.arange(len(self.sizes))
        if self.shuffle:
            order = self._random(epoch, BLOCK_DRAWS).permutation(order)
        starts = np.cumsum(self.sizes[order]) - self.sizes[order]
        changes = np.flatnonzero(np.diff(starts // self.window_rows)) + 1
        return np.split(order, changes)

    def _random(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *self.stream, *purpose])


@runtime_checkable
class OrderedRows(Protocol):
    """Rows that say themselves in which order they are trained on."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def order(self, seed: int, shuffle: bool, stream: tuple[int, ...]) -> Order:
        """The order that they are read in; other for another `stream`."""
        ...


def order_of(rows: Sized, seed: int, shuffle: bool, stream: tuple[int, ...] = ()) -> Order:
    """In which order rows are trained on."""
    if isinstance(rows, OrderedRows):
        return rows.order(seed, shuffle, stream)
    return Epochs(len(rows), seed=seed, shuffle=shuffle, stream=stream)


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
