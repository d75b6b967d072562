"""Rows, loaded and collated ahead by worker processes, in the samplers' order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from kd.data.base import Rows
from kd.data.mixture import sizes_of
from kd.data.sampler import Split, TrainSampler, ValidationSampler, order_of
from kd.data.workers import end_with_run, start_fork_server
from kd.types import Batch, Rejected, Sample, UserError

T = TypeVar("T")
Collate = Callable[[list[Sample | Rejected]], T]


class BatchStream(Generic[T]):
    """Endless micro-batches of this rank, whatever `collate` makes of a list of rows.

    `position` counts the rows that all ranks have been handed, and is all of the state: rows that
    workers have fetched ahead do not count, and it means the same on any number of ranks and
    workers. Loading starts with the first `next`.
    """

    def __init__(
        self,
        rows: Rows,
        collate: Collate[T],
        split: Split,
        *,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        if len(rows) == 0:
            raise UserError("The training split has no rows.")
        self.rows, self.collate, self.split = rows, collate, split
        self.seed, self.shuffle = seed, shuffle
        self.num_workers, self.pin_memory = num_workers, pin_memory
        if num_workers:
            start_fork_server()
        self._places = order_of(rows, seed, shuffle)
        self.seek(0)

    def __iter__(self) -> BatchStream[T]:
        return self

    def __next__(self) -> T:
        if self._batches is None:
            self._batches = self._load()
        batch = next(self._batches)
        self.position += self.split.stride
        return batch

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return self._places.num_rows

    def metrics(self) -> dict[str, float]:
        """What the rows handed out so far were made of, over all ranks, where that is a choice."""
        return self._places.metrics(self.position)

    def seek(self, position: int) -> None:
        """Go on after the first `position` rows of the stream."""
        self.position = position
        self._batches: Iterator[T] | None = None

    def at(self, slots: list[int]) -> T:
        """What `collate` makes of these slots of the stream; the position stays as it is."""
        return self.collate([self.rows[self._places.row(slot)] for slot in slots])

    def _load(self) -> Iterator[T]:
        # Not `_places`: it reads ahead, and each would have the other work out its epoch again.
        order = order_of(self.rows, self.seed, self.shuffle)
        sampler = TrainSampler(order, self.split, position=self.position)
        return _load(self.rows, self.collate, sampler, self.num_workers, self.pin_memory)


def validation_batches(
    rows: Rows,
    collate: Collate[T],
    split: Split,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[T]:
    """Every row exactly once over all ranks, in the same number of batches on each.

    The last batches may have no row: what `collate` makes of [] keeps the ranks in step. No batch
    has rows of two data sets of a mixture.
    """
    sampler = ValidationSampler(sizes_of(rows), split)
    return _load(rows, collate, sampler, num_workers, pin_memory)


def _load(
    rows: Rows,
    collate: Collate[T],
    sampler: Iterable[list[int]],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[T]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        loader = StatefulDataLoader(
            _Reader(rows),  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_Packer(collate),
            pin_memory=pin_memory,
            multiprocessing_context=start_fork_server() if num_workers else None,
            worker_init_fn=end_with_run if num_workers else None,
            # Its own generator: the default would advance torch's global random state here.
            generator=torch.Generator(),
        )
    return _Contents(iter(loader))


@dataclass
class _Reader:
    """Rows as they are read by a worker, which would wrap an error in a traceback."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> list[Sample | Rejected] | UserError:
        try:
            return [self.rows[number] for number in numbers]
        except UserError as error:
            return error


@dataclass
class _Packet(Generic[T]):
    """What travels from a worker. The loader pins what has this method, and no other class."""

    content: T | UserError

    def pin_memory(self) -> _Packet[T]:
        if not isinstance(self.content, Batch):
            return self
        return _Packet(cast(T, self.content.map(torch.Tensor.pin_memory)))


@dataclass
class _Packer(Generic[T]):
    collate: Collate[T]

    def __call__(self, rows: list[Sample | Rejected] | UserError) -> _Packet[T]:
        return _Packet(rows if isinstance(rows, UserError) else self.collate(rows))


@dataclass
class _Contents(Generic[T]):
    """What a loader's packets hold; a UserError that came in one is raised here."""

    packets: Iterator[_Packet[T]]

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        content = next(self.packets).content
        if isinstance(content, UserError):
            raise content
        return content
