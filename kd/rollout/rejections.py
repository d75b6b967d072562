"""What becomes of rows that cannot be trained on: an error, or a count and a line in the log."""

from __future__ import annotations

import logging

from kd.types import Rejected, UserError

logger = logging.getLogger(__name__)

NAMED_ROWS = 5
UNUSABLE_IN_A_ROW = 1000
"""Of one rank, after which it gives up; fewer where an epoch has fewer."""


class Rejections:
    """Counts rejected rows and names the first few; `on_broken_row` is `raise` or `drop`."""

    def __init__(self, on_broken_row: str):
        self.on_broken_row = on_broken_row
        self.counters = {"dropped_too_long": 0, "dropped_broken": 0}
        self.first: list[Rejected] = []
        self._in_a_row = 0

    def note(self, rejected: list[Rejected]) -> None:
        """Count and log. UserError with the row's id and reason for a broken one under `raise`."""
        for row in rejected:
            if row.broken and self.on_broken_row == "raise":
                raise UserError(
                    f"Row {row.id} is broken: {row.reason}. "
                    f"Mend or remove it, or count such rows and go on with data.on_broken_row=drop."
                )
            self.counters["dropped_broken" if row.broken else "dropped_too_long"] += 1
            if len(self.first) < NAMED_ROWS:
                self.first.append(row)
                logger.warning("Row %s is dropped: %s", row.id, row.reason)
                if len(self.first) == NAMED_ROWS:
                    logger.warning("More rows may be dropped; they are counted, not named.")

    def note_read(self, num_usable: int, rejected: list[Rejected], num_rows: int) -> None:
        """Also UserError where an epoch of `num_rows`, or so many rows, could not be used."""
        self.note(rejected)
        self._in_a_row = 0 if num_usable else self._in_a_row + len(rejected)
        if self._in_a_row >= min(num_rows, UNUSABLE_IN_A_ROW):
            epoch = ", a whole epoch," if self._in_a_row >= num_rows else ""
            raise UserError(
                f"None of {self._in_a_row} rows in succession{epoch} could be used. "
                f"The first ones: {self.reasons()}."
            )

    def reasons(self) -> str:
        """The first two rows rejected, each with its reason."""
        return "; ".join(f"{row.id}: {row.reason}" for row in self.first[:2])
