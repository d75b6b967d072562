"""Training text from the data set: every row with its reference answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from kd.rollout.config import RolloutConfig
from kd.rollout.rejections import Rejections
from kd.types import Batch, UserError


class Stream(Protocol):
    """Endless batches with one integer of state."""

    position: int

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        ...

    def __next__(self) -> Batch:
        """The next micro-batch of this rank."""
        ...

    def seek(self, position: int) -> None:
        """Go on after `position` rows."""
        ...


@dataclass
class DatasetRollout(RolloutConfig):
    """Off-policy: the data set's own answers."""

    def build(self, stream: Stream, on_broken_row: str) -> DatasetSource:
        """A source of the batches of `stream`."""
        return DatasetSource(stream, on_broken_row)


class DatasetSource:
    """Hands on the batches of a stream, and sees to their rejected rows."""

    def __init__(self, stream: Stream, on_broken_row: str):
        self.stream = stream
        self.rejections = Rejections(on_broken_row)
        self._unusable_in_a_row = 0

    @property
    def counters(self) -> dict[str, int]:
        """Rows dropped by this rank; summed over ranks they survive a resume."""
        return self.rejections.counters

    def take(self, n: int) -> list[Batch]:
        """The next `n` micro-batches; one may have no row left.

        Raises UserError at a broken row, unless such rows are dropped, and where as many rows in
        succession as an epoch has were all unusable.
        """
        return [self._next() for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        """The rows handed out and dropped over all ranks. Collective: call it on every rank."""
        return {"position": self.stream.position, **_sum_over_ranks(self.counters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the next row. Rank 0 takes the earlier counts, so that the sum holds."""
        self.stream.seek(state["position"])
        first = not dist.is_initialized() or dist.get_rank() == 0
        for name in self.counters:
            self.counters[name] = state[name] if first else 0

    def _next(self) -> Batch:
        batch = next(self.stream)
        self.rejections.note(batch.rejected)
        self._unusable_in_a_row += len(batch.rejected)
        if batch.samples:
            self._unusable_in_a_row = 0
        if self._unusable_in_a_row >= self.stream.num_rows:
            raise UserError(
                f"None of {self._unusable_in_a_row} rows in succession, a whole epoch, could be "
                f"used. The first ones: {self.rejections.reasons()}."
            )
        return batch


def _sum_over_ranks(counts: dict[str, int]) -> dict[str, int]:
    if not dist.is_initialized():
        return dict(counts)
    ranks: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, counts)
    return {name: sum(rank[name] for rank in ranks) for name in counts}
