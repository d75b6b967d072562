"""A teacher's top-k as targets: the divergence is taken on k + 2 buckets.

They are the k likeliest tokens, the response's own token, and all others as one. No divergence of
distributions grows when outcomes are lumped together (data processing inequality), so forward KL,
reverse KL and JSD on the buckets never exceed the dense value; with k = V - 1 they are equal to it.

Shape legend: N response tokens, C of them in a chunk, V vocabulary, K the top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.objective import below_maximum
from kd.teacher.payload import ABSENT, TopK, rest
from kd.types import UserError


@dataclass
class SparseTargets:
    """Satisfies `TeacherTargets`."""

    top: TopK
    response_ids_N: Tensor
    vocab: int
    """The entries that the teacher's distribution is over; the student's beyond are left out."""
    temperature: float
    """Of the log-probs."""
    tail: bool = True
    """False: only the k, renormalised."""

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs [C, K + 2] of both models on the buckets; without the tail [C, K].

        Raises UserError where the log-probs are of another temperature and cannot be changed.
        """
        dtype = torch.float64 if student_logits_CV.dtype == torch.float64 else torch.float32
        logits_CV = below_maximum(student_logits_CV[:, : self.vocab].to(dtype))
        if temperature != 1:
            logits_CV = logits_CV / temperature
        ids_CK, teacher_CK = self.top.ids_NK[rows], self.top.logp_NK[rows].to(dtype)
        if not self.tail:
            # What is renormalised can change its temperature: p^(a/b), again renormalised.
            free_CK = teacher_CK <= ABSENT / 2
            teacher_CK = (teacher_CK * (self.temperature / temperature)).log_softmax(-1)
            student_CK = logits_CV.gather(1, ids_CK).masked_fill(free_CK, ABSENT)
            return student_CK.log_softmax(-1), teacher_CK
        if temperature != self.temperature:
            raise UserError(
                f"the teacher's top-k log-probs are of temperature {self.temperature:g}, the loss "
                f"has {temperature:g}: set loss.temperature={self.temperature:g}"
            )
        response_C1 = self.response_ids_N[rows, None]
        log_z_C1 = logits_CV.logsumexp(-1, keepdim=True)
        support_CK = torch.cat([ids_CK, response_C1], 1)
        tail_C1 = rest(logits_CV, support_CK)[:, None]
        student = torch.cat([logits_CV.gather(1, support_CK), tail_C1], 1) - log_z_C1
        others = self.top.response_logp_N[rows, None], self.top.tail_N[rows, None]
        teacher = torch.cat([teacher_CK, *(x.to(dtype) for x in others)], 1)
        # Places of the k that are not taken, and the response's token where it is among the k.
        free_CK = teacher_CK <= ABSENT / 2
        twice_C1 = ((ids_CK == response_C1) & ~free_CK).any(-1, keepdim=True)
        void = torch.cat([free_CK, twice_C1, torch.zeros_like(twice_C1)], 1)
        return student.masked_fill(void, ABSENT), teacher.masked_fill(void, ABSENT)
