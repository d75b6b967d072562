"""Options of the group `loss` for one tokenizer, and the objective that every option builds.

Shape legend: N target rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.align import NEEDS_ALIGNED_LOSS, AlignedTargets
from kd.loss.aligned import AlignedBody, AlignedLoss
from kd.loss.body import AutogradBody, Divergence
from kd.loss.divergences import forward_kl, generalized_jsd, reverse_kl
from kd.objective import (
    Body,
    CompilePolicy,
    Count,
    DenseBody,
    DenseLoss,
    KDOutput,
    Kernel,
    check_head,
    check_positive,
    check_range,
    check_teacher,
    chunked_objective,
    kd_weight,
)
from kd.types import DenseTargets, TeacherTargets, UserError


@dataclass(frozen=True)
class Objective:
    """CE + KD of one run: call it on the target rows of each micro-batch."""

    divergence: Divergence | AlignedLoss
    """A function of log-probs, which serves any targets of one tokenizer; or a loss on groups."""
    closed_form: DenseLoss | None
    """The same for dense targets, faster; None: the function serves them too."""
    temperature: float
    kd_ratio: float
    compile: CompilePolicy = CompilePolicy.auto
    chunk_mib: int | None = None
    kernel: Kernel = Kernel.compiled

    def __call__(
        self,
        student_hidden_ND: Tensor,
        student_weight_VD: Tensor,
        student_bias_V: Tensor | None,
        labels_N: Tensor,
        targets: TeacherTargets | None,
        num_targets: Count,
        num_kd_targets: Count | None = None,
    ) -> KDOutput:
        """Loss of rows that are all targets; see `chunked_objective`.

        A label of -100 says that the row has no reference answer: no CE, but KD in full.
        `targets` hold the teacher's word on the same rows; they are not looked at when kd_ratio
        is 0. `num_kd_targets` is the number of groups of the whole optimizer step, for aligned
        losses; for all others every target counts, and it can only be `num_targets`.

        Raises UserError for shapes that do not fit, targets that are missing, or targets that this
        loss cannot be taken of.
        """
        check_head("student", student_hidden_ND, student_weight_VD, student_bias_V, labels_N)
        targets = self._usable(targets, student_weight_VD, labels_N)
        body, cut = body_for(targets, self), None
        if isinstance(targets, AlignedTargets) and isinstance(body, AlignedBody):
            body.kd_weight = kd_weight(num_targets, num_kd_targets, labels_N.device)
            cut = targets.groups.chunks
        elif targets is not None:
            _check_same_count(num_targets, num_kd_targets)
        return chunked_objective(
            student_hidden_ND,
            student_weight_VD,
            student_bias_V,
            labels_N,
            body,
            kd_ratio=self.kd_ratio,
            num_targets=num_targets,
            num_kd_targets=num_kd_targets if cut else None,
            budget_mib=self.chunk_mib,
            cut=cut,
        )

    def _usable(
        self, targets: TeacherTargets | None, student_weight_VD: Tensor, labels_N: Tensor
    ) -> TeacherTargets | None:
        """The targets, checked; dense ones as this loss needs them; None with kd_ratio 0."""
        if self.kd_ratio == 0:
            return None
        if targets is None:
            raise UserError("There are no teacher targets: choose a teacher, or kd_ratio=0.")
        if isinstance(targets, AlignedTargets):
            _check_aligned(student_weight_VD, targets, labels_N)
        if isinstance(targets, DenseTargets):
            check_teacher(student_weight_VD, targets, labels_N)
            if isinstance(self.divergence, AlignedLoss):
                return AlignedTargets.one_to_one(targets, len(student_weight_VD))
        return targets


def _check_same_count(num_targets: Count, num_kd_targets: Count | None) -> None:
    if num_kd_targets is None or num_kd_targets is num_targets:
        return
    if isinstance(num_targets, Tensor) or num_kd_targets != num_targets:
        raise UserError(
            f"num_kd_targets is {num_kd_targets}, num_targets {num_targets}: with one tokenizer "
            "they are the same."
        )


def _check_aligned(weight_VD: Tensor, targets: AlignedTargets, labels_N: Tensor) -> None:
    """Raise UserError unless the teacher fits its groups, and these the student's head and rows."""
    groups, matched = targets.groups, targets.matched
    teacher_ids_M = groups.teacher.ids_R
    check_head("teacher", targets.hidden_MD, targets.weight_VD, targets.bias_V, teacher_ids_M)
    if len(groups.student.ids_R) != len(labels_N):
        raise UserError(
            f"The groups are of {len(groups.student.ids_R)} student rows, but there are "
            f"{len(labels_N)}."
        )
    for who, head_VD, needed in (
        ("student", weight_VD, matched.student_size),
        ("teacher", targets.weight_VD, matched.teacher_size),
    ):
        if needed > len(head_VD):
            raise UserError(
                f"The {who}'s tokenizer has {needed} tokens that are matched, its head only "
                f"{len(head_VD)} entries: they are not of one model."
            )


CE_ONLY = DenseLoss("forward_kl", beta=0.5, temperature=1.0, kd_ratio=0.0)


def _autograd_body(targets: TeacherTargets, objective: Objective) -> Body:
    if isinstance(objective.divergence, AlignedLoss):
        raise UserError(
            "loss=uld and loss=gold need the teacher's whole distribution, which these targets do "
            "not have: choose teacher=local, or another loss."
        )
    return AutogradBody(targets, objective.divergence, objective.temperature, objective.kd_ratio)


@functools.singledispatch
def body_for(targets: TeacherTargets, objective: Objective) -> Body:
    """The body that serves this kind of targets: autograd, unless there is a closed form."""
    return _autograd_body(targets, objective)


@body_for.register
def _(targets: DenseTargets, objective: Objective) -> Body:
    if objective.closed_form is None:
        return _autograd_body(targets, objective)
    return DenseBody(targets, objective.closed_form, objective.compile, objective.kernel)


@body_for.register
def _(targets: AlignedTargets, objective: Objective) -> Body:
    if not isinstance(objective.divergence, AlignedLoss):
        raise UserError(NEEDS_ALIGNED_LOSS)
    return AlignedBody(targets, objective.divergence, objective.kd_ratio)


@body_for.register
def _(targets: None, objective: Objective) -> Body:
    return DenseBody(targets, CE_ONLY, objective.compile, objective.kernel)


@dataclass
class LossConfig:
    """What all losses have in common."""

    temperature: float = 1.0
    """Softens both distributions; the KD term is multiplied by its square."""
    chunk_mib: int | None = None
    """Memory for the logits of one chunk, in MiB; null: 2,560 on a GPU, else 256."""
    compile: CompilePolicy = CompilePolicy.auto
    """For a teacher's whole distribution; sparse targets are not compiled."""
    kernel: Kernel = Kernel.compiled
    """For a teacher's whole distribution: `compiled` as `compile` says, `triton` on a CUDA device,
    or `eager`."""

    def validate(self) -> None:
        """Raise UserError for values out of range."""
        check_positive("loss.temperature", self.temperature)
        if self.chunk_mib is not None:
            check_positive("loss.chunk_mib", self.chunk_mib)
        if self.compile is CompilePolicy.always and self.kernel is not Kernel.compiled:
            raise UserError(
                f"loss.compile=always, but loss.kernel={self.kernel.value} is not compiled: leave "
                "one of them out"
            )

    def build(self, kd_ratio: float) -> Objective:
        """The objective that mixes CE with this divergence by `kd_ratio`."""
        raise NotImplementedError

    def meta_body(self, kd_ratio: float, teacher_vocab: int) -> Body:
        """The body for a teacher's whole distribution of one tokenizer, without memory."""
        targets = None
        if kd_ratio > 0:
            hidden_ND, weight_VD = (torch.empty(n, 1, device="meta") for n in (0, teacher_vocab))
            targets = DenseTargets(hidden_ND, weight_VD)
        return body_for(targets, self.build(kd_ratio))

    def _build(
        self, name: str, divergence: Divergence, kd_ratio: float, beta: float = 0.5
    ) -> Objective:
        closed_form = DenseLoss(name, beta, self.temperature, kd_ratio)
        return Objective(
            divergence,
            closed_form,
            self.temperature,
            kd_ratio,
            self.compile,
            self.chunk_mib,
            self.kernel,
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
