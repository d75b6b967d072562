"""What the recipe hands to a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kd.parallel import World
from kd.rollout.engine import Policy
from kd.types import Batch, Rejected, Rollout, Sample, Teacher


class Stream(Protocol):
    """Endless lists of rows, collated, with one integer of state."""

    position: int
    """The slots that all ranks have been handed."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        ...

    def __next__(self) -> Any:
        """The next rows of this rank."""
        ...

    def at(self, slots: list[int]) -> Any:
        """The rows in these slots of the stream."""
        ...

    def seek(self, position: int) -> None:
        """Go on after `position` slots."""
        ...


class Collate(Protocol):
    """Makes batches, and prepares rows for generation."""

    def __call__(self, rows: list[Sample | Rejected | Rollout]) -> Batch:
        """A micro-batch."""
        ...

    def render(self, rows: list[Sample | Rejected]) -> list[Sample | Rejected]:
        """Rows whose prompts are rendered once and for all."""
        ...

    def screen(
        self, rows: list[Sample | Rejected], response_tokens: int | None
    ) -> tuple[list[Sample], list[Rejected]]:
        """Rows with room for a response (None: for their own answer), and those without."""
        ...


@dataclass
class Parts:
    """What a source is made of."""

    stream: Callable[[Callable[[list[Sample | Rejected]], Any], int], Stream]
    """(collation, rows that a rank reads at a time) -> the training rows."""
    collate: Collate
    student: Policy
    teacher: Policy | None
    """None: there is no teacher that could respond."""
    told_ahead: Teacher | None
    """Who is told of the batches of the next step while this one is trained on; None: nobody."""
    micro_batch_size: int
    grad_accum: int
    seed: int
    on_broken_row: str
    world: World
