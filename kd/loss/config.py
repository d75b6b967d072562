"""Options of the group `loss`, and the objective that each builds.

Shape legend: N target rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from kd.loss.body import AutogradBody, Divergence
from kd.loss.divergences import forward_kl, generalized_jsd, reverse_kl
from kd.objective import (
    Body,
    CompilePolicy,
    DenseBody,
    DenseLoss,
    KDOutput,
    check_head,
    check_positive,
    check_range,
    check_teacher,
    chunked_objective,
)
from kd.types import DenseTargets, TeacherTargets, UserError


@dataclass(frozen=True)
class Objective:
    """CE + KD of one run: call it on the target rows of each micro-batch."""

    divergence: Divergence
    """A function of log-probs, which serves any targets."""
    closed_form: DenseLoss | None
    """The same for dense targets, faster; None: the function serves them too."""
    temperature: float
    kd_ratio: float
    compile: CompilePolicy = CompilePolicy.auto
    chunk_mib: int | None = None

    def __call__(
        self,
        student_hidden_ND: Tensor,
        student_weight_VD: Tensor,
        student_bias_V: Tensor | None,
        labels_N: Tensor,
        targets: TeacherTargets | None,
        num_targets: int | Tensor,
    ) -> KDOutput:
        """Loss of rows that are all targets; see `chunked_objective`.

        A label of -100 says that the row has no reference answer: no CE, but KD in full.
        `targets` hold the teacher's word on the same rows; they are not looked at when kd_ratio
        is 0. Raises UserError for shapes that do not fit, or targets that are missing.
        """
        check_head("student", student_hidden_ND, student_weight_VD, student_bias_V, labels_N)
        if self.kd_ratio == 0:
            targets = None
        elif targets is None:
            raise UserError("There are no teacher targets: choose a teacher, or kd_ratio=0.")
        elif isinstance(targets, DenseTargets):
            check_teacher(student_weight_VD, targets, labels_N)
        return chunked_objective(
            student_hidden_ND,
            student_weight_VD,
            student_bias_V,
            labels_N,
            body_for(targets, self),
            kd_ratio=self.kd_ratio,
            num_targets=num_targets,
            budget_mib=self.chunk_mib,
        )


CE_ONLY = DenseLoss("forward_kl", beta=0.5, temperature=1.0, kd_ratio=0.0)


def _autograd_body(targets: TeacherTargets, objective: Objective) -> Body:
    return AutogradBody(targets, objective.divergence, objective.temperature, objective.kd_ratio)


@functools.singledispatch
def body_for(targets: TeacherTargets, objective: Objective) -> Body:
    """The body that serves this kind of targets: autograd, unless there is a closed form."""
    return _autograd_body(targets, objective)


@body_for.register
def _(targets: DenseTargets, objective: Objective) -> Body:
    if objective.closed_form is None:
        return _autograd_body(targets, objective)
    return DenseBody(targets, objective.closed_form, objective.compile)


@body_for.register
def _(targets: None, objective: Objective) -> Body:
    return DenseBody(targets, CE_ONLY, objective.compile)


@dataclass
class LossConfig:
    """What all losses have in common."""

    temperature: float = 1.0
    """Softens both distributions; the KD term is multiplied by its square."""
    chunk_mib: int | None = None
    """Memory for the logits of one chunk, in MiB; null: 2,560 on a GPU, else 256."""
    compile: CompilePolicy = CompilePolicy.auto
    """For a teacher's whole distribution; sparse targets are not compiled."""

    def validate(self) -> None:
        """Raise UserError for values out of range."""
        check_positive("loss.temperature", self.temperature)
        if self.chunk_mib is not None:
            check_positive("loss.chunk_mib", self.chunk_mib)

    def build(self, kd_ratio: float) -> Objective:
        """The objective that mixes CE with this divergence by `kd_ratio`."""
        raise NotImplementedError

    def _build(
        self, name: str, divergence: Divergence, kd_ratio: float, beta: float = 0.5
    ) -> Objective:
        closed_form = DenseLoss(name, beta, self.temperature, kd_ratio)
        return Objective(
            divergence, closed_form, self.temperature, kd_ratio, self.compile, self.chunk_mib
        )


@dataclass
class ForwardKLConfig(LossConfig):
    """KL(teacher || student): the student covers all that the teacher does."""

    def build(self, kd_ratio: float) -> Objective:
        """See the base class."""
        return self._build("forward_kl", forward_kl, kd_ratio)


@dataclass
class ReverseKLConfig(LossConfig):
    """KL(student || teacher): the student keeps to what the teacher does."""

    def build(self, kd_ratio: float) -> Objective:
        """See the base class."""
        return self._build("reverse_kl", reverse_kl, kd_ratio)


@dataclass
class JSDConfig(LossConfig):
    """Generalized Jensen-Shannon divergence."""

    beta: float = 0.5
    """The teacher's weight in the mixture; 0 means forward KL, 1 reverse KL."""

    def validate(self) -> None:
        """Raise UserError for values out of range."""
        super().validate()
        check_range("loss.beta", self.beta, 0, 1)

    def build(self, kd_ratio: float) -> Objective:
        """See the base class."""
        divergence = functools.partial(generalized_jsd, beta=self.beta)
        return self._build("jsd", divergence, kd_ratio, self.beta)
