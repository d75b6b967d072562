"""Rows of a table as samples: what conversations and question-answer tables have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kd.data.base import RowError, with_system_prompt
from kd.data.images import ImageLoader
from kd.data.messages import Parsed
from kd.data.sampler import Order
from kd.data.tables import Table
from kd.types import Rejected, Sample, UserError


@dataclass
class TableRows:
    """Map-style rows of `table`; images are read and decoded when a row is asked for."""

    table: Table
    parse: Callable[[dict[str, Any]], Parsed]
    images: ImageLoader
    id_column: str | None = None
    kind_column: str | None = None
    system_prompt: str | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample | Rejected:
        """The sample, or the row's id with what is wrong with it."""
        row_id = self.table.row_id(index)
        try:
            row = self.table.row(index)
            if self.id_column is not None:
                row_id = f"{column(row, self.id_column)} ({row_id})"
            kind = str(column(row, self.kind_column)) if self.kind_column else ""
            parsed = self.parse(row)
            images = [self.images.load(reference) for reference in parsed.images]
        except RowError as error:
            return Rejected(row_id, str(error), broken=True)
        messages = with_system_prompt(parsed.messages, self.system_prompt)
        return Sample(row_id, messages, images, parsed.answer, kind)

    def order(self, seed: int, shuffle: bool, stream: tuple[int, ...]) -> Order:
        """See `sampler.OrderedRows`."""
        return self.table.order(seed, shuffle, stream)


def column(row: dict[str, Any], name: str) -> Any:
    """The value of column `name`; RowError where there is none."""
    if row.get(name) is None:
        raise RowError(f"column '{name}' is missing or empty; there is {', '.join(row)}")
    return row[name]


def validation_choice(table: Table, val_samples: int | None) -> Table:
    """A fixed random choice of `val_samples` rows; all where it is None."""
    if val_samples is None:
        return table
    if val_samples > len(table):
        raise UserError(
            f"data.val_samples is {val_samples}, but the validation split has {len(table)} rows. "
            f"Lower it, or set it to null to use all."
        )
    return table.sample(val_samples)
