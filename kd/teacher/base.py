"""What every teacher option has in common, and the option of having none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from kd.align import AlignedTargets, Groups, MatchedVocabulary
from kd.model import ALIGNMENTS, FindPositions, FrozenVLM, left_to_the_forward
from kd.parallel import ParallelConfig, World
from kd.types import Batch, DenseTargets, Inputs, TeacherTargets, UserError


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

    @property
    def is_dense(self) -> bool:
        """Whether it serves whole distributions, which every loss can be taken of."""
        return True

    @property
    def temperature_fixed(self) -> float | None:
        """The one temperature that its log-probs have; None: any."""
        return None

    @property
    def keeps_tail(self) -> bool:
        """Whether what it serves is a distribution over all tokens, be it lumped together."""
        return True

    @property
    def can_respond(self) -> bool:
        """Whether it generates responses."""
        return False

    @property
    def needs_fixed_responses(self) -> bool:
        """Whether it only knows responses that come again."""
        return False

    @property
    def is_told_ahead(self) -> bool:
        """Whether it is told of the batches of the next step while this one is trained on."""
        return False

    def identity(self, parallel: ParallelConfig) -> dict[str, str]:
        """What its word depends on besides what it reads, as far as that is known without it."""
        return {}

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin | None:
        """The teacher's processor; None: there is no teacher."""
        raise NotImplementedError

    def build_teacher(
        self,
        processor: ProcessorMixin | None,
        world: World,
        parallel: ParallelConfig,
        student_vocab: int,
    ) -> BaseTeacher:
        """Load and distribute, or connect. `student_vocab` entries are all that is compared."""
        raise NotImplementedError

    def meta_model(self) -> PreTrainedModel | None:
        """The teacher on the meta device, for counting; None: nothing is loaded."""
        return None


class BaseTeacher:
    """Satisfies `Teacher`; a teacher that does nothing ahead and has nothing to say."""

    matched: MatchedVocabulary | None = None
    """The tokens that the student's vocabulary has as well, where the tokenizers differ."""
    vlm: FrozenVLM | None = None
    """The model, where it is one of these ranks."""

    @property
    def positions(self) -> FindPositions:
        """Of what it reads, for the collator; left to its forward where its model is not known."""
        return left_to_the_forward if self.vlm is None else self.vlm.positions

    @property
    def identity(self) -> dict[str, str]:
        """What its word depends on besides what it reads, where its config did not know."""
        return {}

    def expect(self, batches: list[Batch]) -> None:
        """Nothing is done ahead."""

    def targets(self, batch: Batch) -> TeacherTargets | None:
        """See `Teacher`."""
        raise NotImplementedError

    def read(self, inputs: Inputs) -> Tensor | None:
        """Hidden states [N, D] of the target rows; None: it reads no inputs on these ranks."""
        return None

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """See `Teacher`."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Nothing to say."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Head:
    """What turns a teacher's hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None = None

    def targets(
        self, hidden_ND: Tensor, batch: Batch, matched: MatchedVocabulary | None
    ) -> DenseTargets | AlignedTargets:
        """Of the hidden states of a batch's teacher rows."""
        if not isinstance(batch.groups, Groups):
            return DenseTargets(hidden_ND, self.weight_VD, self.bias_V)
        assert matched is not None
        return AlignedTargets(hidden_ND, self.weight_VD, self.bias_V, batch.groups, matched)


@dataclass
class NoTeacherConfig(TeacherConfig):
    """No teacher: cross-entropy alone."""

    def build_processor(self, corpus: Callable[[], list[str]]) -> None:
        """There is none."""

    def build_teacher(
        self,
        processor: ProcessorMixin | None,
        world: World,
        parallel: ParallelConfig,
        student_vocab: int,
    ) -> NoTeacher:
        """Nothing is loaded."""
        return NoTeacher()


class NoTeacher(BaseTeacher):
    """Serves nothing; for `kd_ratio=0`."""

    def targets(self, batch: Batch) -> None:
        """No targets."""
