"""Several data sets as one: the rows of a step are drawn from them by weights.

Which data set a slot of the stream is filled from is drawn slot by slot, from the seed alone, and
each data set is read in epochs of its own. A slot's row so hangs on the slots before it; these are
drawn again, block by block, and the stream's whole state stays one integer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kd.data.base import DataConfig, Rows, with_system_prompt
from kd.data.sampler import order_of
from kd.types import Rejected, Sample, UserError

BLOCK = 4096
"""Slots that are drawn together."""
DRAWS_STREAM, ROWS_STREAM = 2, 3
"""Of the seed: what is drawn by it must not hang together (1 is the rollouts')."""
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class MixtureConfig(DataConfig):
    """Named data sets, each any other option.

    `num_workers`, `max_length` and `on_broken_row` are those of the mixture: what its data sets
    have there is not read.
    """

    datasets: dict[str, DataConfig] = field(default_factory=dict)
    """By name: +data@data.datasets.NAME=digits, or in a defaults list."""
    weights: dict[str, float] = field(default_factory=dict)
    """One for each name, relative to each other; 0: not trained on, only validated."""

    @property
    def parts(self) -> list[DataConfig]:
        """The data sets."""
        return list(self.datasets.values())

    def dataset_names(self, split: str) -> list[str]:
        """Of those in the split."""
        # In their order: on the command line they may come in any, and a resumed run must read
        # the same rows.
        return sorted(self.datasets if split == "validation" else self._trained)

    def validate(self) -> None:
        """Raise UserError on a value that cannot work."""
        super().validate()
        if not self.datasets:
            raise UserError(
                "data.datasets is empty: name the data sets of the mixture, e.g. "
                "+data@data.datasets.mine=conversations"
            )
        if self.val_samples is not None:
            raise UserError(
                "data.val_samples has no effect on a mixture: set data.datasets.NAME.val_samples"
            )
        self._validate_names()
        self._validate_weights()
        for name, part in self.datasets.items():
            if type(part) is DataConfig or isinstance(part, MixtureConfig):
                raise UserError(
                    f"data.datasets.{name} is none of the data sets that can be mixed: choose one, "
                    f"e.g. +data@data.datasets.{name}=conversations"
                )
            with _named(name):
                part.validate()

    def build(self, split: str) -> MixedRows:
        """The rows of all data sets, one after the other; UserError where one has none."""
        self.validate()
        names = self.dataset_names(split)
        parts: list[Rows] = []
        for name in names:
            with _named(name):
                parts.append(self.datasets[name].build(split))
            if len(parts[-1]) == 0:
                raise UserError(
                    f"Dataset {name} has no rows in its {split} split: give it some, or leave the "
                    "data set out."
                )
        weights = [self.weights[name] for name in names]
        shuffles = [self.datasets[name].shuffle for name in names]
        return MixedRows(names, parts, weights, shuffles, self.system_prompt)

    def corpus(self) -> list[str]:
        """The texts of all data sets that are trained on, each once."""
        texts = [text for name in sorted(self._trained) for text in self.datasets[name].corpus()]
        return list(dict.fromkeys(texts))

    @property
    def _trained(self) -> list[str]:
        return [name for name in self.datasets if self.weights[name] > 0]

    def _validate_names(self) -> None:
        for name in self.datasets:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"data.datasets has '{name}': a name is made of letters, digits, _ and -"
                )
        alike = {name.lower(): name for name in self.datasets}
        for name in self.datasets:
            if alike[name.lower()] != name:
                raise UserError(
                    f"data.datasets has both '{name}' and '{alike[name.lower()]}', which differ in "
                    "case only: rename one"
                )

    def _validate_weights(self) -> None:
        unknown = sorted(set(self.weights) - set(self.datasets))
        if unknown:
            raise UserError(
                f"data.weights names {', '.join(unknown)}, but data.datasets has "
                f"{', '.join(sorted(self.datasets))}"
            )
        missing = sorted(set(self.datasets) - set(self.weights))
        if missing:
            raise UserError(
                f"data.weights has none for {', '.join(missing)}: give one for every data set "
                "(0: only validate on it)"
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"data.weights.{name} is {weight}: a weight is 0 or more")
        if not self._trained:
            raise UserError("data.weights are all 0: one of them must be above 0")


@dataclass
class MixedRows:
    """The rows of named data sets, one after the other."""

    names: list[str]
    parts: list[Rows]
    weights: list[float]
    shuffles: list[bool]
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        self.ends = np.cumsum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows of each data set."""
        return [len(part) for part in self.parts]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample | Rejected:
        """The row, told apart from those of other data sets by its id and its kind."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        name, part = self.names[which], self.parts[which]
        row = part[index - int(self.ends[which]) + len(part)]
        row_id = f"{name}/{row.id}"
        if isinstance(row, Rejected):
            return dataclasses.replace(row, id=row_id)
        kind = f"{name}.{row.kind}" if row.kind else name
        messages = with_system_prompt(row.messages, self.system_prompt)
        return dataclasses.replace(row, id=row_id, messages=messages, kind=kind, dataset=name)

    def order(self, seed: int, shuffle: bool, stream: tuple[int, ...]) -> MixedOrder:
        """See `sampler.OrderedRows`. A mixture is no part of another: it has one stream."""
        assert not stream
        return MixedOrder(self, seed, shuffle)


class MixedOrder:
    """Slots filled from data sets drawn by weight, each read in epochs of its own."""

    def __init__(self, rows: MixedRows, seed: int, shuffle: bool):
        self.names, self.sizes, self.seed = rows.names, rows.sizes, seed
        self.num_rows = len(rows)
        self.firsts = rows.ends - rows.sizes
        self.limits = np.cumsum(rows.weights) / np.sum(rows.weights)
        self.epochs = [
            order_of(part, seed, shuffle and shuffled, (ROWS_STREAM, i))
            for i, (part, shuffled) in enumerate(zip(rows.parts, rows.shuffles, strict=True))
        ]
        self._before = [np.zeros(len(rows.parts), dtype=np.int64)]
        """Per block, the rows that each data set has given before it."""
        self._block, self._draws, self._ranks = -1, *2 * [np.empty(0, dtype=np.int64)]

    def row(self, slot: int) -> int:
        """The row in a slot of the endless stream."""
        block, place = divmod(slot, BLOCK)
        self._seek(block)
        which = self._draws[place]
        number = self._before[block][which] + self._ranks[place]
        return int(self.firsts[which]) + self.epochs[which].row(int(number))

    def counts(self, position: int) -> np.ndarray:
        """Rows that each data set has given to the first `position` slots."""
        block, place = divmod(position, BLOCK)
        self._seek(block)
        return self._before[block] + np.bincount(self._draws[:place], minlength=len(self.names))

    def metrics(self, position: int) -> dict[str, float]:
        """The share of each data set in the rows so far, and how often it was gone through."""
        found: dict[str, float] = {}
        for name, count, size in zip(self.names, self.counts(position), self.sizes, strict=True):
            found[f"data/share_{name}"] = float(count) / max(1, position)
            found[f"data/epochs_{name}"] = float(count) / size
        return found

    def _seek(self, block: int) -> None:
        """Have the draws of a block, and the counts before it."""
        if block == self._block:
            return
        while len(self._before) <= block:
            drawn = self._drawn(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.names)))
        self._block, self._draws = block, self._drawn(block)
        self._ranks = np.empty_like(self._draws)
        for which in range(len(self.names)):
            mine = self._draws == which
            self._ranks[mine] = np.arange(mine.sum())

    def _drawn(self, block: int) -> np.ndarray:
        """Which data set fills each slot of a block."""
        u = np.random.default_rng([self.seed, block, DRAWS_STREAM]).random(BLOCK)
        return np.searchsorted(self.limits[:-1], u, side="right")


def sizes_of(rows: Rows) -> list[int]:
    """Rows of each data set that `rows` are of, one after the other."""
    return rows.sizes if isinstance(rows, MixedRows) else [len(rows)]


def ranges_of(rows: Rows) -> dict[str, range]:
    """The indices of each data set that `rows` are of, by its name; "": it is one alone."""
    names = rows.names if isinstance(rows, MixedRows) else [""]
    ends = itertools.accumulate(sizes_of(rows))
    return {
        name: range(end - size, end)
        for name, size, end in zip(names, sizes_of(rows), ends, strict=True)
    }


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which data set a mistake is in: its messages know of one alone."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"Dataset {name} (where data.… is data.datasets.{name}.…): {error}"
        ) from None
