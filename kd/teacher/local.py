"""A teacher on the same ranks as the student, and none at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, ProcessorMixin

from kd.align import AlignedTargets, Groups, MatchedVocabulary
from kd.model import ALIGNMENTS, FrozenVLM, PretrainedModel
from kd.parallel import ParallelConfig, World
from kd.types import Batch, DenseTargets, UserError


@dataclass
class TeacherConfig:
    """Base of the `teacher` options."""

    alignment: str = "auto"
    """How its tokens meet the student's: tokens (one by one), bytes (groups that spell the same,
    for loss=uld and loss=gold), or auto: by tokens where both have one tokenizer."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if self.alignment not in ALIGNMENTS:
            raise UserError(f"{key}.alignment={self.alignment}: use {', '.join(ALIGNMENTS)}")

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

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        PretrainedModel.validate(self, key)
        TeacherConfig.validate(self, key)

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


class LocalTeacher:
    """Serves the whole distribution of every target row."""

    def __init__(self, vlm: FrozenVLM) -> None:
        self.vlm = vlm
        self.matched: MatchedVocabulary | None = None
        """The tokens that the student's vocabulary has as well, where the tokenizers differ."""

    def targets(self, batch: Batch) -> DenseTargets | AlignedTargets:
        """Hidden states of the response rows in its own rendering, and the head."""
        dense = self.vlm.targets(batch.teacher)
        if not isinstance(batch.groups, Groups):
            return dense
        assert self.matched is not None
        head = dense.weight_VD, dense.bias_V
        return AlignedTargets(dense.hidden_ND, *head, batch.groups, self.matched)
