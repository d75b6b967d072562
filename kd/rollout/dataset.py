"""Training text from the data set: every row with its reference answer."""

from __future__ import annotations

from typing import Any

from kd.parallel import World
from kd.rollout.parts import Batching, Stream
from kd.rollout.rejections import Rejections
from kd.types import Batch


class DatasetSource:
    """Has the rows of a stream batched, and sees to those rejected."""

    def __init__(self, stream: Stream, batching: Batching, on_broken_row: str, world: World):
        self.stream, self.batching, self.world = stream, batching, world
        self.rejections = Rejections(on_broken_row)

    def take(self) -> list[Batch]:
        """The micro-batches of the next step; one may have no row left. Collective.

        Raises UserError at a broken row, unless such rows are dropped, and where as many rows in
        succession as an epoch has were all unusable.
        """
        batches = self.batching.take(self.stream)
        for batch in batches:
            self.rejections.note_read(len(batch.rollouts), batch.rejected, self.stream.num_rows)
        return batches

    def metrics(self) -> dict[str, float]:
        """The rows handed out and dropped so far, over all ranks. Collective."""
        counters = self.rejections.counters
        sums = self.world.sum_ints(*counters.values())
        dropped = {f"data/{name}": value for name, value in zip(counters, sums, strict=True)}
        return dropped | self.stream.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The rows handed out and dropped over all ranks. Collective: call it on every rank."""
        counters = self.rejections.counters
        sums = self.world.sum_ints(*counters.values())
        return {"position": self.stream.position, **dict(zip(counters, sums, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the next row. Rank 0 takes the earlier counts, so that the sum holds."""
        self.stream.seek(state["position"])
        for name in self.rejections.counters:
            self.rejections.counters[name] = state[name] if self.world.is_main else 0

    def close(self) -> None:
        """Nothing is held."""
