"""Divergences as pure functions of log-probs, for any support; autograd gives their gradients.

Shape legend: C rows, K support (the vocabulary, or a top-k set with its tail).
p is the teacher, q the student. A probability of 0 (log-prob -inf) contributes 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(student_logp_CK: Tensor, teacher_logp_CK: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p - log q), [C]."""
    p_CK = teacher_logp_CK.exp()
    gap_CK = (teacher_logp_CK - student_logp_CK).masked_fill(p_CK == 0, 0)
    return (p_CK * gap_CK).sum(-1)


def reverse_kl(student_logp_CK: Tensor, teacher_logp_CK: Tensor) -> Tensor:
    """KL(q || p) = Σ q (log q - log p), [C]."""
    q_CK = student_logp_CK.exp()
    gap_CK = (student_logp_CK - teacher_logp_CK).masked_fill(q_CK == 0, 0)
    return (q_CK * gap_CK).sum(-1)


def generalized_jsd(student_logp_CK: Tensor, teacher_logp_CK: Tensor, beta: float) -> Tensor:
    """β KL(p || m) + (1-β) KL(q || m) with m = βp + (1-β)q, [C] (GKD, arXiv 2306.13649).

    As there, β = 0 means forward KL and β = 1 reverse KL, though the limit is 0 at both ends.
    """
    if beta == 0:
        return forward_kl(student_logp_CK, teacher_logp_CK)
    if beta == 1:
        return reverse_kl(student_logp_CK, teacher_logp_CK)
    logp_CK, logq_CK = (x.clamp(min=-1e4) for x in (teacher_logp_CK, student_logp_CK))
    p_CK, q_CK = logp_CK.exp(), logq_CK.exp()
    ratio_CK = logp_CK - logq_CK + math.log(beta) - math.log1p(-beta)
    logm_CK = logq_CK + torch.nn.functional.softplus(ratio_CK) + math.log1p(-beta)
    teacher_C = (p_CK * (logp_CK - logm_CK)).sum(-1)
    student_C = (q_CK * (logq_CK - logm_CK)).sum(-1)
    return beta * teacher_C + (1 - beta) * student_C
