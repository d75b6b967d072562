"""The dense body: a teacher's hidden states and head, compared with the student's logits.

Shape legend: C rows of a chunk, V student vocabulary, K the vocabulary prefix both models share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from kd.objective_compile import CompilePolicy, run_compiled, run_eagerly, use_compile
from kd.objective_dense import DenseLoss
from kd.objective_loop import accumulation_dtype, head_logits
from kd.types import DenseTargets, UserError


class Kernel(Enum):
    """What turns the logits of a chunk into its losses and their gradient."""

    compiled = "compiled"
    """torch.compile, as `compile` says."""
    triton = "triton"
    """A pair of Triton kernels; a CUDA device only. The gradient takes no memory of its own."""
    eager = "eager"
    """PyTorch operations, one at a time."""


def check_triton(device: torch.device) -> None:
    """Raise UserError where Triton does not run: it needs a CUDA device, or its interpreter."""
    try:
        from kd.objective_triton import INTERPRETED
    except ImportError as error:
        raise UserError(
            f"kernel is triton, but Triton cannot be imported ({error}): set it to compiled."
        ) from None
    if device.type != "cuda" and not INTERPRETED:
        raise UserError(
            f"kernel is triton, but the device is {device.type}, not cuda: set it to compiled."
        )


@dataclass
class DenseBody:
    """CE and a closed-form divergence from a teacher's hidden states and head (None: CE only)."""

    teacher: DenseTargets | None
    loss: DenseLoss
    policy: CompilePolicy = CompilePolicy.auto
    kernel: Kernel = Kernel.compiled
    _teacher_logits: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def narrows_in_place(self) -> bool:
        """The Triton pair alone does: it goes through a row in order."""
        return self.kernel is Kernel.triton

    def _shared(self, vocab: int) -> int:
        return 0 if self.teacher is None else min(vocab, self.teacher.weight_VD.shape[0])

    def row_bytes(self, vocab: int) -> int:
        """One row of teacher logits."""
        if self.teacher is None:
            return 0
        return self._shared(vocab) * accumulation_dtype(self.teacher.weight_VD.dtype).itemsize

    def _teacher_logits_CK(self, rows: slice, vocab: int) -> Tensor | None:
        """Teacher logits of these rows on the shared vocabulary, in a buffer that is reused."""
        if self.teacher is None:
            return None
        size, shared = rows.stop - rows.start, self._shared(vocab)
        weight_KD, bias_V = self.teacher.weight_VD[:shared], self.teacher.bias_V
        hidden_CD = self.teacher.hidden_ND[rows]
        if self._teacher_logits is None:
            dtype = accumulation_dtype(weight_KD.dtype)
            self._teacher_logits = hidden_CD.new_empty(size, shared, dtype=dtype)
        out_CK = self._teacher_logits[:size]
        bias_K = None if bias_V is None else bias_V[:shared]
        head_logits(hidden_CD, weight_KD, bias_K, out_CK)
        return out_CK

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, rows: slice, dlogits_CV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (kd_C, ce_C); write the gradient of their mix to `dlogits_CV` if given."""
        vocab = logits_CV.shape[1]
        chunk = logits_CV, self._teacher_logits_CK(rows, vocab), labels_C, dlogits_CV
        if self.kernel is Kernel.triton:
            check_triton(logits_CV.device)
            from kd.objective_triton import run_triton

            return run_triton(chunk, self.loss)
        compiles = self.kernel is Kernel.compiled
        compiled = compiles and use_compile(self.policy, logits_CV.device, vocab)
        return run_compiled(chunk, self.loss) if compiled else run_eagerly(chunk, self.loss)
