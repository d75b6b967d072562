"""Rows of a table as samples: what conversations and question-answer tables have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd.data.base import RowError, with_system_prompt
from kd.data.images import ImageLoader
from kd.data.messages import Parsed
from kd.data.tables import Table
from kd.types import Rejected, Sample


@dataclass
class TableRows:
    """Map-style rows `index` of `table`; images are read and decoded when a row is asked for."""

    table: Table
    index: np.ndarray
    parse: Callable[[dict[str, Any]], Parsed]
    images: ImageLoader
    id_column: str | None = None
    kind_column: str | None = None
    system_prompt: str | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample | Rejected:
        """The sample, or the row's id with what is wrong with it."""
        number = int(self.index[index])
        row_id = self.table.row_id(number)
        try:
            row = self.table.row(number)
            if self.id_column is not None:
                row_id = f"{column(row, self.id_column)} ({row_id})"
            kind = str(column(row, self.kind_column)) if self.kind_column else ""
            parsed = self.parse(row)
            images = [self.images.load(reference) for reference in parsed.images]
        except RowError as error:
            return Rejected(row_id, str(error), broken=True)
        messages = with_system_prompt(parsed.messages, self.system_prompt)
        return Sample(row_id, messages, images, parsed.answer, kind)


def column(row: dict[str, Any], name: str) -> Any:
    """The value of column `name`; RowError where there is none."""
    if row.get(name) is None:
        raise RowError(f"column '{name}' is missing or empty; there is {', '.join(row)}")
    return row[name]
