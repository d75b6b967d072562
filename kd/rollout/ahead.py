"""The batches of the next step are read before this one is trained on, for a teacher far away."""

from __future__ import annotations

from typing import Any

from kd.rollout.dataset import DatasetSource
from kd.types import Batch, Teacher, UserError


class Ahead:
    """Tells the teacher of every step's batches one step ahead.

    State and metrics are those of the batches handed out: what is read ahead is read again after
    a resume. So is an error told at the step that it belongs to.
    """

    def __init__(self, source: DatasetSource, teacher: Teacher) -> None:
        self.source, self.teacher = source, teacher
        self._next: tuple[list[Batch], UserError | None] | None = None
        self._state: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}

    def take(self) -> list[Batch]:
        """The micro-batches of the next step. Collective. Raises what reading them has raised."""
        batches, error = self._next or self._read()
        # Also on a rank with an error: these are collectives.
        self._state, self._metrics = self.source.state_dict(), self.source.metrics()
        self._next = self._read()
        if error is not None:
            raise error
        return batches

    def _read(self) -> tuple[list[Batch], UserError | None]:
        try:
            batches = self.source.take()
        except UserError as error:
            return [], error
        self.teacher.expect(batches)
        return batches, None

    def metrics(self) -> dict[str, float]:
        """See `Source`."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        return self.source.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`."""
        self.source.load_state_dict(state)
        self._next, self._state = None, None

    def close(self) -> None:
        """See `Source`."""
        self.source.close()
