"""What a rank holds in a step, by part and moment, and settings that take less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.table import Table

GIB = 2**30

WEIGHTS, GRADIENTS, OPTIMIZER = "student weights", "gradients", "optimizer"
TEACHER, GATHERED = "teacher weights", "gathered blocks, embeddings and heads"
ACTIVATIONS, LOSS = "activations", "loss buffers"


@dataclass(frozen=True)
class Plan:
    """Counts for one rank of a run; bytes unless said otherwise."""

    ranks: int
    student_parameters: int
    """Or a draft's."""
    trained_parameters: int
    teacher_parameters: int
    """Or a target's; 0: it is not on these ranks."""
    rows_per_step: int
    tokens_per_step: int
    moments: dict[str, dict[str, int]]
    """What is held, by part, in each of the moments of a step that may need most."""
    not_counted: list[str] = field(default_factory=list)

    @property
    def peak(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What is held then."""
        return self.moments[self.peak]

    @property
    def total(self) -> int:
        """Bytes on one rank at the peak of a step."""
        return sum(self.parts.values())


def add_parts(table: Table, parts: dict[str, int], names: dict[str, str]) -> None:
    """Rows for what is held at once, and their sum."""
    for name, size in parts.items():
        table.add_row(names.get(name, name), f"{size / GIB:.2f} GiB")
    table.add_row("total per rank", f"{sum(parts.values()) / GIB:.2f} GiB")


@dataclass(frozen=True)
class MemoryOption:
    """Settings that take less memory than those before."""

    overrides: list[str]
    """On top of the config."""
    plan: Callable[[int], Plan]
    """With so many rows in a micro-batch."""


def largest_micro_batch(plan: Callable[[int], Plan], room: float, most: int) -> int:
    """A divisor of `most`, the rows of a rank; 0: not even one row fits."""
    divisors = (rows for rows in range(1, most + 1) if most % rows == 0)
    return max((rows for rows in divisors if plan(rows).total <= room), default=0)
