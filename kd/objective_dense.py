"""CE and divergences of whole distributions, with gradients in closed form.

Shape legend: C rows of a chunk, V student vocabulary, K the vocabulary prefix both models share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.types import IGNORE_INDEX, UserError

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise UserError unless `low <= value <= high` and value is finite."""
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise UserError(f"{name} is {value}: it must be {bounds}.")


def check_positive(name: str, value: float) -> None:
    """Raise UserError unless value is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value}: it must be greater than 0.")


@dataclass(frozen=True)
class DenseLoss:
    """Everything about the loss that is fixed during a run.

    `beta` is the teacher's weight in the mixture of the generalized JSD. By the convention of GKD
    (arXiv 2306.13649) beta = 0 means forward KL and beta = 1 reverse KL, though the limit of the
    JSD is 0 at both ends.
    """

    divergence: str
    beta: float
    temperature: float
    kd_ratio: float

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.divergence not in DIVERGENCES:
            options = ", ".join(DIVERGENCES)
            raise UserError(f"divergence is {self.divergence!r}: it must be one of {options}.")
        check_range("beta", self.beta, 0, 1)
        check_range("kd_ratio", self.kd_ratio, 0, 1)
        check_positive("temperature", self.temperature)

    @property
    def formula(self) -> str:
        """The divergence, with the JSD at its ends called by the KL that it means."""
        if self.divergence == "jsd" and self.beta in (0, 1):
            return "reverse_kl" if self.beta else "forward_kl"
        return self.divergence

    def closed_form(
        self, student_logp_CK: Tensor, teacher_logp_CK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(D_C, dD/da_CK) with a = student logits / temperature."""
        if self.formula == "forward_kl":
            return forward_kl(student_logp_CK, teacher_logp_CK)
        if self.formula == "reverse_kl":
            return reverse_kl(student_logp_CK, teacher_logp_CK)
        return jsd(student_logp_CK, teacher_logp_CK, self.beta)


def forward_kl(student_logp_CK: Tensor, teacher_logp_CK: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = Σ p (log p - log q), and q - p."""
    p_CK, q_CK = teacher_logp_CK.exp(), student_logp_CK.exp()
    gap_CK = (teacher_logp_CK - student_logp_CK).masked_fill(p_CK == 0, 0)  # -inf - -inf is NaN
    return (p_CK * gap_CK).sum(-1), q_CK - p_CK


def reverse_kl(student_logp_CK: Tensor, teacher_logp_CK: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = Σ q g with g = log q - log p, and q (g - <q, g>)."""
    q_CK = student_logp_CK.exp()
    gap_CK = (student_logp_CK - teacher_logp_CK).masked_fill(q_CK == 0, 0)
    weighted_CK = q_CK * gap_CK
    kl_C1 = weighted_CK.sum(-1, keepdim=True)
    return kl_C1[:, 0], weighted_CK - q_CK * kl_C1


def jsd(student_logp_CK: Tensor, teacher_logp_CK: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(p || m) + (1-β) KL(q || m) with m = βp + (1-β)q, and q (u - <q, u>).

    Here u = (1-β)(log q - log m). Log-probs are cut off where even an fp64 probability is 0, so
    that 0 * log 0 is 0.
    """
    logp_CK, logq_CK = teacher_logp_CK.clamp(min=-1e4), student_logp_CK.clamp(min=-1e4)
    p_CK, q_CK = logp_CK.exp(), logq_CK.exp()
    tiny = torch.finfo(p_CK.dtype).tiny
    logm_CK = (beta * p_CK + (1 - beta) * q_CK).clamp(min=tiny).log()
    weighted_CK = q_CK * ((1 - beta) * (logq_CK - logm_CK))
    student_C1 = weighted_CK.sum(-1, keepdim=True)
    teacher_C = (p_CK * (logp_CK - logm_CK)).sum(-1)
    return beta * teacher_C + student_C1[:, 0], weighted_CK - q_CK * student_C1


def dense_chunk(
    logits_CV: Tensor,
    teacher_logits_CK: Tensor | None,
    labels_C: Tensor,
    dlogits_CV: Tensor | None,
    loss: DenseLoss,
) -> tuple[Tensor, Tensor]:
    """(kd_C, ce_C) of one chunk; the gradient of their mix goes to `dlogits_CV` if there is one.

    Where the label is -100, ce and its gradient are 0.
    """
    temperature, kd_ratio, vocab = loss.temperature, loss.kd_ratio, logits_CV.shape[1]
    logp_CV = logits_CV.log_softmax(-1)  # not minus a log-sum-exp, see `below_maximum`
    has_label_C = labels_C != IGNORE_INDEX
    index_C1 = labels_C.where(has_label_C, 0)[:, None]
    ce_C = (-logp_CV.gather(1, index_C1)[:, 0]).where(has_label_C, 0)  # may be inf: no factor
    kd_C, dkd_CK = torch.zeros_like(ce_C), None
    if teacher_logits_CK is not None:
        shared = teacher_logits_CK.shape[1]
        student_logp_CK = logp_CV  # the same sweep serves both where it can
        if temperature != 1 or shared != vocab:
            student_logp_CK = (logits_CV[:, :shared] / temperature).log_softmax(-1)
        teacher_logp_CK = (teacher_logits_CK / temperature).log_softmax(-1)
        kd_C, dkd_CK = loss.closed_form(student_logp_CK, teacher_logp_CK)
        kd_C = kd_C * temperature**2
    if dlogits_CV is not None:
        grad_CV = torch.zeros_like(logits_CV)
        if dkd_CK is not None:
            padding = vocab - dkd_CK.shape[1]
            grad_CV = torch.nn.functional.pad(kd_ratio * temperature * dkd_CK, (0, padding))
        if kd_ratio < 1:
            is_label_CV = torch.arange(vocab, device=labels_C.device) == labels_C[:, None]
            scale_C1 = (1 - kd_ratio) * has_label_C[:, None].to(logp_CV.dtype)
            grad_CV = grad_CV + scale_C1 * (logp_CV.exp() - is_label_CV.to(logp_CV.dtype))
        dlogits_CV.copy_(grad_CV)
    return kd_C, ce_C
