"""The micro-batches of a step: so many rows each, or as many as a budget of tokens holds."""

from __future__ import annotations

from typing import Any, Protocol

from kd.batching.divide import Layout, Size, balance, divide, fill
from kd.parallel import World
from kd.types import Batch, Rejected, UserError


class Collate(Protocol):
    """Makes rows ready to be read, and batches of them."""

    def __call__(self, rows: list[Any]) -> Batch:
        """Both at once."""
        ...

    def prepare(self, rows: list[Any]) -> list[Any]:
        """What is to be read (with `length` and `has_image`), or Rejected, for each row."""
        ...

    def batch(self, outcomes: list[Any], *, packed: bool = False) -> Batch:
        """A micro-batch of prepared rows."""
        ...

    @property
    def filler_length(self) -> int:
        """Tokens of the row that a batch without an image gets; 0: it gets none."""
        ...


class Stream(Protocol):
    """Endless lists of this rank's rows, as `prepare` has left them."""

    position: int

    def __next__(self) -> Any:
        """The next rows of this rank."""
        ...

    def at(self, slots: list[int]) -> list[Any]:
        """The rows in these slots of the stream."""
        ...


class FixedBatches:
    """`micro_batch_size` rows each, in their order. Collated where they are read: by workers."""

    def __init__(self, collate: Collate, micro_batch_size: int, grad_accum: int) -> None:
        self.prepare = collate
        self.rows_at_a_time, self.grad_accum = micro_batch_size, grad_accum

    def take(self, stream: Stream) -> list[Batch]:
        """Those of the next step."""
        return [next(stream) for _ in range(self.grad_accum)]

    def divide(self, rows: list[Any]) -> list[Batch]:
        """Of the rows of a step; None leaves its place empty."""
        size = self.rows_at_a_time
        starts = range(0, len(rows), size)
        return [
            self.prepare([row for row in rows[start : start + size] if row is not None])
            for start in starts
        ]


class BudgetBatches:
    """At most `max_tokens` each, of similar or well-fitting rows, and as many on every rank.

    Ranks tell each other how long their rows are; that is all that is needed to agree.
    """

    def __init__(
        self,
        collate: Collate,
        layout: Layout,
        max_tokens: int,
        rows_per_step: int,
        world: World,
    ) -> None:
        self.collate, self.prepare = collate, collate.prepare
        self.layout, self.max_tokens = layout, max_tokens
        self.rows_at_a_time, self.world = rows_per_step, world

    def take(self, stream: Stream) -> list[Batch]:
        """Those of the next step. Rows move to ranks that have fewer tokens. Collective."""
        first = stream.position + self.world.rank * self.rows_at_a_time
        found = dict(enumerate(next(stream), first))
        ranks = balance(self.world.gather(_sizes(found)))
        moved = [size.slot for size in ranks[self.world.rank] if size.slot not in found]
        found |= zip(moved, stream.at(moved), strict=True)
        batches = self._batches(found, ranks)
        for slot in moved:
            if isinstance(found[slot], Rejected):  # nowhere else would it be missed
                raise UserError(
                    f"Row {found[slot].id} was read by one rank and is refused on another: "
                    f"{found[slot].reason}. All ranks must be able to read all rows"
                )
        return batches

    def divide(self, rows: list[Any]) -> list[Batch]:
        """Of the rows of a step on this rank, where they stay. Collective."""
        found = dict(enumerate(self.prepare([row for row in rows if row is not None])))
        return self._batches(found, self.world.gather(_sizes(found)))

    def _batches(self, found: dict[int, Any], ranks: list[list[Size]]) -> list[Batch]:
        # Forwards and backwards are collectives: every rank has as many, some of them empty.
        count = max(1, *(len(fill(sizes, self.layout, self.max_tokens)) for sizes in ranks))
        groups = divide(ranks[self.world.rank], self.layout, self.max_tokens, count)
        batches = [
            self.collate.batch([found[size.slot] for size in group], packed=self.layout.is_packed)
            for group in groups
        ]
        batches[0].rejected += [row for row in found.values() if isinstance(row, Rejected)]
        return batches


def _sizes(found: dict[int, Any]) -> list[Size]:
    return [
        Size(slot, row.length, row.has_image)
        for slot, row in found.items()
        if not isinstance(row, Rejected)
    ]
