"""The `rollout` options: where the responses that are trained on come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from kd.rollout.ahead import Ahead
from kd.rollout.dataset import DatasetSource
from kd.rollout.engine import EngineConfig, Policy, Sampling
from kd.rollout.generated import GeneratedSource, Generator
from kd.rollout.hf import HFEngineConfig
from kd.rollout.parts import Parts
from kd.rollout.window import Mix, Partition
from kd.types import Source, UserError

OFF_POLICY = ("dataset", "teacher")


@dataclass
class RolloutConfig:
    """Base of the options."""

    def validate(self) -> None:
        """Refuse values out of range."""

    def validate_window(self, micro_batch_size: int, grad_accum: int, max_length: int) -> None:
        """Refuse a window that does not fit the batch, or responses that fit no row."""

    @property
    def student_share(self) -> float:
        """The largest share of rows that the student responds to."""
        return 0.0

    @property
    def least_student_share(self) -> float:
        """The smallest; it may change over the steps."""
        return self.student_share

    @property
    def reads_answers(self) -> bool:
        """Whether answers of the data set are learnt."""
        return False

    @property
    def teacher_responds(self) -> bool:
        """Whether the teacher generates."""
        return False

    @property
    def is_fixed(self) -> bool:
        """Whether every epoch has the same responses."""
        return False

    def build(self, parts: Parts) -> Source:
        """The source. Collective."""
        raise NotImplementedError


@dataclass
class DatasetRollout(RolloutConfig):
    """Off-policy: the data set's own answers."""

    @property
    def reads_answers(self) -> bool:
        """See the base class."""
        return True

    @property
    def is_fixed(self) -> bool:
        """See the base class."""
        return True

    def build(self, parts: Parts) -> DatasetSource | Ahead:
        """See the base class."""
        stream = parts.stream(parts.batching.prepare, parts.batching.rows_at_a_time)
        source = DatasetSource(stream, parts.batching, parts.on_broken_row, parts.world)
        return source if parts.told_ahead is None else Ahead(source, parts.told_ahead)


@dataclass
class GeneratedRollout(RolloutConfig):
    """What all options with an engine have in common."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: Sampling = field(default_factory=Sampling)
    num_generations: int = 1
    """Rollouts of each prompt."""
    generation_batch_size: int | None = None
    """Prompts per window and rank, times num_generations = the rows of the window; null: what
    train.micro_batch_size x train.grad_accum x window_steps leaves."""
    window_steps: int = 1
    """Optimizer steps that one call of the engine generates for. More: larger calls, and rollouts
    of older weights."""
    async_steps: int = 0
    """1: generate the next window while this one is trained on, one window behind the weights."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if type(self.engine) is EngineConfig:
            raise UserError("no engine is chosen: give rollout/engine=hf or rollout/engine=vllm")
        self.engine.validate("rollout.engine")
        self.sampling.validate("rollout.sampling")
        for name in ("num_generations", "window_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout.{name}={getattr(self, name)}: must be at least 1")
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise UserError(
                f"rollout.generation_batch_size={self.generation_batch_size}: must be at least 1, "
                "or null"
            )
        if self.num_generations > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"rollout.num_generations={self.num_generations} at sampling.temperature=0 would "
                "be the same response each time: raise the temperature, or generate one"
            )
        if self.async_steps not in (0, 1):
            raise UserError(f"rollout.async_steps={self.async_steps}: 0, or 1 window ahead")
        if self.async_steps and not self.engine.is_remote:
            raise UserError(
                "rollout.async_steps=1 needs an engine that generates elsewhere: this one uses the "
                "weights that are being trained; choose rollout/engine=vllm, or async_steps=0"
            )

    def validate_window(self, micro_batch_size: int, grad_accum: int, max_length: int) -> None:
        """See the base class."""
        partition = self._partition(micro_batch_size, grad_accum)
        partition.validate(self.generation_batch_size)
        if self.sampling.max_new_tokens >= max_length:
            raise UserError(
                f"rollout.sampling.max_new_tokens={self.sampling.max_new_tokens} leaves no room "
                f"for a prompt in data.max_length={max_length}: lower the one or raise the other"
            )

    def _partition(self, micro_batch_size: int, grad_accum: int) -> Partition:
        return Partition(micro_batch_size, grad_accum, self.num_generations, self.window_steps)

    def _source(self, parts: Parts, mix: Mix, generators: dict[str, Generator]) -> GeneratedSource:
        partition = self._partition(parts.micro_batch_size, parts.grad_accum)
        return GeneratedSource(parts, partition, mix, generators, self.async_steps > 0)

    def _generator(self, policy: Policy, engine: EngineConfig, is_trained: bool) -> Generator:
        return Generator(engine.build(policy), self.num_generations, self.sampling, is_trained)


@dataclass
class StudentRollout(GeneratedRollout):
    """On-policy: the student responds, and is told by the teacher at every token."""

    @property
    def student_share(self) -> float:
        """See the base class."""
        return 1.0

    def build(self, parts: Parts) -> GeneratedSource:
        """See the base class."""
        generators = {"student": self._generator(parts.student, self.engine, True)}
        return self._source(parts, Mix(parts.seed, 1.0), generators)


@dataclass
class TeacherRollout(GeneratedRollout):
    """Sequence-level distillation: the teacher responds in the data set's place."""

    @property
    def teacher_responds(self) -> bool:
        """See the base class."""
        return True

    def build(self, parts: Parts) -> GeneratedSource:
        """See the base class."""
        assert parts.teacher is not None
        generators = {"teacher": self._generator(parts.teacher, self.engine, False)}
        return self._source(parts, Mix(parts.seed, 0.0, "teacher"), generators)


@dataclass
class MixedRollout(GeneratedRollout):
    """Each slice of a window is the student's own with probability `lmbda`, else off-policy."""

    lmbda: float = 0.5
    lmbda_end: float | None = None
    """Where lmbda goes to in a straight line over lmbda_steps; null: it stays."""
    lmbda_steps: int | None = None
    off_policy: str = "dataset"
    """Who responds to the other slices: dataset or teacher (which generates by `hf`)."""

    @property
    def student_share(self) -> float:
        """See the base class."""
        return max(self.lmbda, self.lmbda_end or 0.0)

    @property
    def least_student_share(self) -> float:
        """See the base class."""
        return self.lmbda if self.lmbda_end is None else min(self.lmbda, self.lmbda_end)

    @property
    def reads_answers(self) -> bool:
        """See the base class."""
        return self.off_policy == "dataset" and self.least_student_share < 1

    @property
    def teacher_responds(self) -> bool:
        """See the base class."""
        return self.off_policy == "teacher"

    def validate(self) -> None:
        """Refuse values out of range."""
        super().validate()
        for name in ("lmbda", "lmbda_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"rollout.{name}={value}: a probability, in [0, 1]")
        if (self.lmbda_end is None) != (self.lmbda_steps is None):
            raise UserError("rollout.lmbda_end and rollout.lmbda_steps go together: give both")
        if self.lmbda_steps is not None and self.lmbda_steps < 1:
            raise UserError(f"rollout.lmbda_steps={self.lmbda_steps}: must be at least 1")
        if self.off_policy not in OFF_POLICY:
            raise UserError(f"rollout.off_policy={self.off_policy}: use {' or '.join(OFF_POLICY)}")

    def build(self, parts: Parts) -> GeneratedSource:
        """See the base class."""
        generators = {"student": self._generator(parts.student, self.engine, True)}
        if self.teacher_responds:
            assert parts.teacher is not None
            generators["teacher"] = self._generator(parts.teacher, HFEngineConfig(), False)
        mix = Mix(parts.seed, self.lmbda, self.off_policy, self.lmbda_end, self.lmbda_steps or 1)
        return self._source(parts, mix, generators)
