"""Fused linear cross-entropy + knowledge distillation.

Over the target rows, with z and t the logits of student and teacher:

    loss = ((1-r) Σ CE(z, y) + r T² Σ D(softmax(t/T), softmax(z/T))) / num_targets

`fused_linear_kd` takes the rows with label != -100 for targets; `chunked_objective` all its rows,
where -100 says that there is no label y: such a row has KD but no CE.

Shape legend: N rows, Ds / Dt hidden sizes of student and teacher, Vs / Vt their vocabularies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd.objective_body import DenseBody, Kernel
from kd.objective_compile import CompilePolicy
from kd.objective_dense import DIVERGENCES, DenseLoss, check_positive, check_range
from kd.objective_loop import (
    Body,
    Count,
    KDOutput,
    accumulation_dtype,
    below_maximum,
    chunked_objective,
    head_logits,
    kd_weight,
)
from kd.types import IGNORE_INDEX, DenseTargets, UserError

__all__ = [
    "DIVERGENCES",
    "Body",
    "CompilePolicy",
    "Count",
    "DenseBody",
    "DenseLoss",
    "KDOutput",
    "Kernel",
    "accumulation_dtype",
    "below_maximum",
    "check_head",
    "check_positive",
    "check_range",
    "check_teacher",
    "chunked_objective",
    "fused_linear_kd",
    "head_logits",
    "kd_weight",
]


def check_head(
    who: str, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor
) -> None:
    """Raise UserError unless hidden states, head and labels fit (metadata only: no host sync)."""
    for name, x, ndim in (("hidden", hidden_ND, 2), ("weight", weight_VD, 2), ("bias", bias_V, 1)):
        if x is None:
            continue
        if isinstance(x, DTensor):
            raise UserError(f"{who}_{name} is sharded: call the loss inside the FSDP2 forward.")
        if x.ndim != ndim or not x.is_floating_point():
            raise UserError(f"{who}_{name} is {x.dtype} {tuple(x.shape)}: want {ndim} float dims.")
        if x.device != hidden_ND.device:
            raise UserError(f"{who}_{name} is on {x.device}, {who}_hidden on {hidden_ND.device}.")
    if hidden_ND.dtype != weight_VD.dtype:
        raise UserError(
            f"{who}_hidden is {hidden_ND.dtype} but {who}_weight is {weight_VD.dtype}: "
            "cast one of them."
        )
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise UserError(
            f"{who}_hidden has {hidden_ND.shape[1]} features but {who}_weight {weight_VD.shape[1]}."
        )
    if bias_V is not None and bias_V.shape[0] != weight_VD.shape[0]:
        raise UserError(f"{who}_bias has {bias_V.shape[0]} entries, its head {weight_VD.shape[0]}.")
    if labels_N.shape != hidden_ND.shape[:1] or labels_N.dtype != torch.int64:
        raise UserError(
            f"labels are {labels_N.dtype} {tuple(labels_N.shape)}: "
            f"want one int64 for each of the {len(hidden_ND)} rows of {who}_hidden."
        )


def check_teacher(weight_VD: Tensor, targets: DenseTargets, labels_N: Tensor) -> None:
    """Raise UserError unless a dense teacher fits the student's head and rows."""
    check_head("teacher", targets.hidden_ND, targets.weight_VD, targets.bias_V, labels_N)
    if targets.hidden_ND.device != weight_VD.device:
        raise UserError(f"teacher is on {targets.hidden_ND.device}, student on {weight_VD.device}.")
    student_vocab, teacher_vocab = weight_VD.shape[0], targets.weight_VD.shape[0]
    if 2 * min(student_vocab, teacher_vocab) < max(student_vocab, teacher_vocab):
        raise UserError(
            f"The student's vocabulary is {student_vocab}, the teacher's {teacher_vocab}: that is "
            "not padding but another tokenizer, and the same index is another token."
        )


def check_kernel(name: str) -> Kernel:
    """The kernel of this name; raises UserError for any other."""
    if name not in Kernel.__members__:
        options = ", ".join(Kernel.__members__)
        raise UserError(f"kernel is {name!r}: it must be one of {options}.")
    return Kernel[name]


def _dense_targets(
    hidden_ND: Tensor | None, weight_VD: Tensor | None, bias_V: Tensor | None, kd_ratio: float
) -> DenseTargets | None:
    if kd_ratio == 0:
        return None
    if hidden_ND is None or weight_VD is None:
        raise UserError(
            f"kd_ratio is {kd_ratio} but there is no teacher: give teacher_hidden and "
            "teacher_weight, or set kd_ratio to 0."
        )
    bias_V = None if bias_V is None else bias_V.detach()
    return DenseTargets(hidden_ND.detach(), weight_VD.detach(), bias_V)


def fused_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_ratio: float = 0.5,
    num_targets: int | Tensor | None = None,
    chunk_size: int | None = None,
    kernel: str = "compiled",
) -> KDOutput:
    """CE on the labels mixed with a divergence from the teacher, without [N, V] logits.

    Args:
        student_hidden: [N, Ds] float; row i predicts labels[i] (already shifted).
        student_weight: [Vs, Ds] in student_hidden's dtype, unsharded; may not require grad.
        teacher_hidden: [N, Dt] float; ignored when kd_ratio is 0, and may then be None.
        teacher_weight: [Vt, Dt] in teacher_hidden's dtype. A padded vocabulary may differ in size
            from the student's: they are compared on the prefix they share.
        labels: [N] int64; -100 is not a target, and such a row is left out altogether.
        student_bias: [Vs] or None.
        teacher_bias: [Vt] or None.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: teacher's weight in the mixture of "jsd"; 0 means forward KL, 1 reverse KL.
        temperature: T, on both models.
        kd_ratio: r. 0 is plain CE; 1 takes no gradient from the labels (`ce` is still reported).
        num_targets: count of targets in the whole optimizer step, all ranks and micro-batches;
            None: those in `labels`.
        chunk_size: rows per chunk; None: from a memory budget.
        kernel: "compiled", "triton" (on a CUDA device) or "eager".

    Returns:
        Differentiable `.loss`, detached `.ce` and `.kd`, with loss = (1-r) ce + r kd; and detached
        `.kd_N` and `.ce_N`, T² D and CE of each row with label != -100, in their order.

    Raises:
        UserError: for values out of range, shapes, dtypes or devices that do not fit.
        RuntimeError: for a second derivative.

    Finding the target rows is a host sync; `chunked_objective` takes rows selected already (a label
    of -100 there means a target without a reference answer, which gets no CE but KD in full).
    """
    loss = DenseLoss(divergence, beta, temperature, kd_ratio)
    check_head("student", student_hidden, student_weight, student_bias, labels)
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size)
    teacher = _dense_targets(teacher_hidden, teacher_weight, teacher_bias, kd_ratio)
    if teacher is not None:
        check_teacher(student_weight, teacher, labels)
    rows_N = (labels != IGNORE_INDEX).nonzero()[:, 0]
    if len(rows_N) < len(labels):
        student_hidden, labels = student_hidden[rows_N], labels[rows_N]
        if teacher is not None:
            teacher.hidden_ND = teacher.hidden_ND[rows_N]
    if num_targets is None:
        num_targets = len(rows_N)
    elif isinstance(num_targets, int) and num_targets < 1 and len(rows_N):
        raise UserError(f"num_targets is {num_targets}, but there are {len(rows_N)} targets.")
    return chunked_objective(
        student_hidden,
        student_weight,
        student_bias,
        labels,
        DenseBody(teacher, loss, kernel=check_kernel(kernel)),
        kd_ratio=kd_ratio,
        num_targets=num_targets,
        chunk_size=chunk_size,
    )
