"""What a logger is, and the two that write nothing themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass
class SampleRecord:
    """One answered validation row."""

    id: str
    kind: str
    question: str
    """The prompt as text."""
    answer: str
    """The reference."""
    student: str
    teacher: str | None
    correct: bool
    """Whether the student's answer counts as right."""
    images: list[Image.Image] = field(default_factory=list)


@dataclass
class RolloutRecord:
    """One response trained on, as the loss saw it."""

    id: str
    kind: str
    question: str
    """The prompt as text."""
    answer: str | None
    """The reference of the data set, if it has one."""
    policy: str
    """Who responded: student, teacher or dataset."""
    tokens: list[str]
    """The response's tokens, decoded one by one; white space is kept."""
    divergence: list[float]
    """Of the teacher from the student at each of `tokens`, times temperature²; nats."""
    finished: bool
    """False: cut at max_new_tokens."""
    staleness: int
    """Optimizer steps between the weights that responded and those that were trained."""
    images: list[Image.Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.divergence), "one divergence per token"


class Logger(Protocol):
    """`start` once, then what there is to record in order of steps, then `close` once."""

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Open the run. `first_step` optimizer steps are done already: 0 for a fresh run, k for
        one that goes on from the checkpoint of step k; what was logged after step k is void.
        """
        ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics (`train/…`, `val/…`) of a step, which may have several such calls."""
        ...

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Record the answered rows of a validation."""
        ...

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Record some of the responses that the optimizer step `step` trained on."""
        ...

    def close(self, failed: bool = False) -> None:
        """End the run; `failed`: it did not come to its last step."""
        ...


class NullLogger:
    """Records nothing: the logger of every rank but the first."""

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Do nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Do nothing."""

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Do nothing."""

    def close(self, failed: bool = False) -> None:
        """Do nothing."""


class CompositeLogger:
    """Passes everything to each of `loggers`, in order."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Start each."""
        for logger in self.loggers:
            logger.start(config, total_steps, first_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log to each."""
        for logger in self.loggers:
            logger.log(step, metrics)

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Give the rows to each."""
        for logger in self.loggers:
            logger.samples(step, rows)

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Give the rows to each."""
        for logger in self.loggers:
            logger.rollouts(step, rows)

    def close(self, failed: bool = False) -> None:
        """Close each in reverse order, also when one of them fails to."""
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close, failed)
