"""A teacher on the same ranks as the student, and none at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from kd.model import FrozenVLM, PretrainedModel
from kd.parallel import ParallelConfig, World
from kd.types import Batch, DenseTargets, Inputs


@dataclass
class TeacherConfig:
    """Base of the `teacher` options."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin | None:
        """The teacher's processor; None: there is no teacher."""
        raise NotImplementedError

    def build_teacher(
        self, processor: ProcessorMixin | None, world: World, parallel: ParallelConfig
    ) -> LocalTeacher | NoTeacher:
        """Load and distribute."""
        raise NotImplementedError

    def meta_model(self) -> PreTrainedModel | None:
        """The teacher on the meta device, for counting; None: nothing is loaded."""
        raise NotImplementedError


@dataclass
class NoTeacherConfig(TeacherConfig):
    """No teacher: cross-entropy alone."""

    def build_processor(self, corpus: Callable[[], list[str]]) -> None:
        """There is none."""

    def build_teacher(
        self, processor: ProcessorMixin | None, world: World, parallel: ParallelConfig
    ) -> NoTeacher:
        """Nothing is loaded."""
        return NoTeacher()

    def meta_model(self) -> None:
        """There is none."""


@dataclass
class LocalTeacherConfig(PretrainedModel, TeacherConfig):
    """A teacher beside the student, sharded over the same ranks."""

    dtype: str = "bfloat16"
    cpu_offload: bool = False
    """Keep the sharded weights in host memory and copy each block to the device when it runs."""

    def build_teacher(
        self, processor: ProcessorMixin | None, world: World, parallel: ParallelConfig
    ) -> LocalTeacher:
        """Load and shard; only rank 0 reads the weights."""
        assert processor is not None
        vlm = FrozenVLM(self.build(processor, with_weights=world.is_main))
        vlm.distribute(world, parallel, cpu_offload=self.cpu_offload)
        return LocalTeacher(vlm)


class NoTeacher:
    """Serves nothing; for `kd_ratio=0`."""

    def targets(self, batch: Batch) -> None:
        """No targets."""

    def generate(
        self, prompts: Inputs, max_new_tokens: int, stop_ids: list[int], forbidden_ids: list[int]
    ) -> None:
        """No answers."""


class LocalTeacher:
    """Serves the whole distribution of every target row."""

    def __init__(self, vlm: FrozenVLM) -> None:
        self.vlm = vlm

    def targets(self, batch: Batch) -> DenseTargets:
        """Hidden states [N, D] of the target rows, and the head."""
        return self.vlm.targets(batch.teacher)

    def generate(
        self, prompts: Inputs, max_new_tokens: int, stop_ids: list[int], forbidden_ids: list[int]
    ) -> Tensor:
        """Greedy answers [B, up to max_new_tokens]."""
        return self.vlm.generate(prompts, max_new_tokens, stop_ids, forbidden_ids)
