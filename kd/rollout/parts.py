"""What the recipe hands to a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kd.parallel import World
from kd.rollout.engine import Policy
from kd.types import Batch, Rejected, Sample, Teacher


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

    def metrics(self) -> dict[str, float]:
        """What the rows handed out so far were made of, over all ranks."""
        ...

    def seek(self, position: int) -> None:
        """Go on after `position` slots."""
        ...


class Collate(Protocol):
    """Prepares rows for generation."""

    def render(self, rows: list[Sample | Rejected]) -> list[Sample | Rejected]:
        """Rows whose prompts are rendered once and for all."""
        ...

    def screen(
        self, rows: list[Sample | Rejected], response_tokens: int | None
    ) -> tuple[list[Sample], list[Rejected]]:
        """Rows with room for a response (None: for their own answer), and those without."""
        ...


class Batching(Protocol):
    """Makes the micro-batches of a step."""

    rows_at_a_time: int
    """Rows that a rank reads at once, to be prepared together."""

    @property
    def prepare(self) -> Callable[[list[Any]], Any]:
        """What is done with them where they are read."""
        ...

    def take(self, stream: Stream) -> list[Batch]:
        """Those of the next rows of a stream of prepared ones. Collective."""
        ...

    def divide(self, rows: list[Any]) -> list[Batch]:
        """Of the rows of a step on this rank; None leaves its place empty. Collective."""
        ...


@dataclass
class Parts:
    """What a source is made of."""

    stream: Callable[[Callable[[list[Sample | Rejected]], Any], int], Stream]
    """(collation, rows that a rank reads at a time) -> the training rows."""
    collate: Collate
    batching: Batching
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
