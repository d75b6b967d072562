"""The autograd body: any divergence on any teacher targets, one chunk at a time.

Shape legend: N target rows, C rows of a chunk, V student vocabulary, K support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.types import IGNORE_INDEX, TeacherTargets

Divergence = Callable[[Tensor, Tensor], Tensor]
"""`(student_logp_CK, teacher_logp_CK) -> loss_C`, both at the temperature."""

LIVE_COPIES = 6
"""Fp32 copies of a chunk of logits that autograd holds at its peak: log-softmaxes and gradients."""


@dataclass
class AutogradBody:
    """CE and a divergence whose gradient autograd finds; its graph lives as long as one chunk."""

    targets: TeacherTargets
    divergence: Divergence
    temperature: float
    kd_ratio: float

    @property
    def narrows_in_place(self) -> bool:
        """It does not."""
        return False

    def row_bytes(self, vocab: int) -> int:
        """What autograd keeps for one row."""
        return LIVE_COPIES * 4 * vocab

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, rows: slice, dlogits_CV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (kd_C, ce_C); write the gradient of their mix to `dlogits_CV` if given."""
        with torch.set_grad_enabled(dlogits_CV is not None):
            leaf_CV = logits_CV.detach().requires_grad_(dlogits_CV is not None)
            aligned = self.targets.align(leaf_CV, rows, self.temperature)
            kd_C = self.temperature**2 * self.divergence(*aligned)
            loss = self.kd_ratio * kd_C.sum()
            with torch.set_grad_enabled(dlogits_CV is not None and self.kd_ratio < 1):
                ce_C = torch.nn.functional.cross_entropy(
                    leaf_CV, labels_C, reduction="none", ignore_index=IGNORE_INDEX
                )
            if self.kd_ratio < 1:
                loss = loss + (1 - self.kd_ratio) * ce_C.sum()
            if dlogits_CV is not None:
                (grad_CV,) = torch.autograd.grad(loss, leaf_CV)
                dlogits_CV.copy_(grad_CV)
        return kd_C.detach(), ce_C.detach()
