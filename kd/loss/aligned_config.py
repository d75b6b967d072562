"""Options of the group `loss` for different tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

from kd.loss.aligned import GOLD, ULD, AlignedLoss, Distance, Merge
from kd.loss.config import LossConfig, Objective
from kd.objective import DIVERGENCES, check_positive, check_range
from kd.types import UserError


@dataclass
class AlignedLossConfig(LossConfig):
    """What ULD and GOLD have in common; `temperature` is the student's.

    The KD term has no factor temperature² here, and `compile` is for kd_ratio=0 alone.
    """

    teacher_temperature: float = 1.0
    merge: Merge = Merge.observed
    """Which row of a group has its distribution: observed (the first) or bayesian (the last)."""
    top_k: int | None = None
    """Probabilities of either model that are sorted, the rest as one; null: all."""

    def validate(self) -> None:
        """Raise UserError for values out of range."""
        super().validate()
        check_positive("loss.teacher_temperature", self.teacher_temperature)
        if self.top_k is not None:
            check_positive("loss.top_k", self.top_k)

    def _aligned(self, distance: Distance, kd_ratio: float) -> Objective:
        loss = AlignedLoss(distance, self.merge, self.temperature, self.teacher_temperature)
        return Objective(loss, None, self.temperature, kd_ratio, self.compile, self.chunk_mib)


@dataclass
class ULDConfig(AlignedLossConfig):
    """Universal Logit Distillation: compares sorted probabilities, whatever they stand for."""

    def build(self, kd_ratio: float) -> Objective:
        """See the base class."""
        return self._aligned(ULD(self.top_k), kd_ratio)


@dataclass
class GOLDConfig(AlignedLossConfig):
    """A divergence on the tokens that both vocabularies have, ULD on all others."""

    divergence: str = "jsd"
    """On matched tokens: forward_kl, reverse_kl or jsd."""
    beta: float = 0.5
    """For jsd: the teacher's weight in the mixture; 0 means forward KL, 1 reverse KL."""
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    """null, both: the matched share of the teacher's vocabulary, and its complement."""

    def validate(self) -> None:
        """Raise UserError for values out of range."""
        super().validate()
        if self.divergence not in DIVERGENCES:
            options = ", ".join(DIVERGENCES)
            raise UserError(f"loss.divergence is {self.divergence!r}: use one of {options}.")
        check_range("loss.beta", self.beta, 0, 1)
        weights = self.matched_weight, self.unmatched_weight
        if (weights[0] is None) != (weights[1] is None):
            raise UserError("loss.matched_weight and loss.unmatched_weight: give both, or neither.")
        for name, weight in zip(("matched_weight", "unmatched_weight"), weights, strict=True):
            if weight is not None:
                check_range(f"loss.{name}", weight, 0)
        if weights == (0, 0):
            raise UserError("loss.matched_weight and loss.unmatched_weight are both 0.")

    def build(self, kd_ratio: float) -> Objective:
        """See the base class."""
        weights = self.matched_weight, self.unmatched_weight
        return self._aligned(GOLD(self.divergence, self.beta, *weights, self.top_k), kd_ratio)
