"""The dense body: whole distributions of both models, gradients in closed form, compilable.

Shape legend: C rows of a chunk, V student vocabulary, K the vocabulary prefix both models share.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from kd.objective_loop import accumulation_dtype, balanced_chunks, head_logits
from kd.types import IGNORE_INDEX, DenseTargets, UserError

log = logging.getLogger(__name__)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")

COMPILE_FROM_VOCAB = 16384
"""Below this vocabulary compiling takes longer than it saves."""

CPU_BLOCK_BYTES = 2 * 2**20
"""Logits per thread that are worked on at a time: they stay in the cache between sweeps."""

EAGER_BLOCK_ROWS = 128
"""Rows per block in eager mode on a GPU, which bounds the temporaries."""


class CompilePolicy(Enum):
    """Whether the pointwise part of the loss goes through torch.compile (GEMMs never do)."""

    auto = "auto"
    """Where torch.compile works and the vocabulary has at least 16,384 entries."""
    always = "always"
    """Refused where torch.compile does not work."""
    never = "never"


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

    def closed_form(
        self, student_logp_CK: Tensor, teacher_logp_CK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(D_C, dD/da_CK) with a = student logits / temperature."""
        if self.divergence == "forward_kl" or (self.divergence == "jsd" and self.beta == 0):
            return forward_kl(student_logp_CK, teacher_logp_CK)
        if self.divergence == "reverse_kl" or self.beta == 1:
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
    logp_CV = logits_CV - logits_CV.logsumexp(-1, keepdim=True)
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


_serial = itertools.count()


@functools.cache
def _compiled(loss: DenseLoss, *layout: object) -> Callable[..., tuple[Tensor, Tensor]]:
    """`dense_chunk` compiled for one loss and one layout of its arguments, any number of rows.

    Dynamo counts recompilations per code object and remembers shapes per function name; past eight
    configurations it would run eagerly without a word. So each gets a code object of its own.
    """
    del layout
    code = dense_chunk.__code__
    code = code.replace(co_name=f"{code.co_name}_{next(_serial)}")
    function = types.FunctionType(code, dense_chunk.__globals__)
    return torch.compile(function, dynamic=False, fullgraph=True)


@functools.cache
def compile_problem(device_type: str) -> str | None:
    """Why torch.compile does not work here; None: it does.

    It needs a C++ compiler, and Triton on a GPU. Found by compiling one line, once per process:
    what is missing shows in many different errors.
    """
    try:
        with torch.no_grad():
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device_type))
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return None


@functools.cache  # told once
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here; logged if not."""
    problem = compile_problem(device_type)
    if problem is not None:
        log.warning("torch.compile does not work here, so the loss runs eagerly: %s", problem)
    return problem is None


def use_compile(policy: CompilePolicy, device: torch.device, vocab: int) -> bool:
    """Decide by policy; raises UserError where compiling is demanded but does not work."""
    if policy is CompilePolicy.never or (
        policy is CompilePolicy.auto and vocab < COMPILE_FROM_VOCAB
    ):
        return False
    works = can_compile(device.type)
    if policy is CompilePolicy.always and not works:
        raise UserError(
            "compile is always, but torch.compile does not work here: set it to auto.\n"
            f"{compile_problem(device.type)}"
        )
    return works


@dataclass
class DenseBody:
    """CE and a closed-form divergence from a teacher's hidden states and head (None: CE only)."""

    teacher: DenseTargets | None
    loss: DenseLoss
    policy: CompilePolicy = CompilePolicy.auto
    _teacher_logits: Tensor | None = field(default=None, init=False, repr=False)

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
        device, vocab = logits_CV.device, logits_CV.shape[1]
        teacher_CK = self._teacher_logits_CK(rows, vocab)
        tensors = logits_CV, teacher_CK, labels_C, dlogits_CV
        compiled = use_compile(self.policy, device, vocab)
        function = _compiled_for(self.loss, tensors) if compiled else dense_chunk
        kd_C, ce_C = logits_CV.new_empty(2, len(labels_C))
        for block in balanced_chunks(len(labels_C), _block_rows(logits_CV, compiled)):
            part = _take(block, tensors)
            if compiled:
                _mark_rows_dynamic(part)
            kd_C[block], ce_C[block] = function(*part, self.loss)
        return kd_C, ce_C


Chunk = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""(logits_CV, teacher_logits_CK, labels_C, dlogits_CV)"""


def _block_rows(logits_CV: Tensor, compiled: bool) -> int:
    """Rows that `dense_chunk` gets at a time.

    It sweeps over them several times. On a CPU they should stay in the cache meanwhile, which is
    worth a factor of 2 to 3; in eager mode the bound also holds down the temporaries.
    """
    if logits_CV.device.type != "cpu":
        return len(logits_CV) if compiled else EAGER_BLOCK_ROWS
    row_bytes = logits_CV.shape[1] * logits_CV.element_size()
    return max(1, CPU_BLOCK_BYTES // row_bytes) * torch.get_num_threads()


def _take(block: slice, chunk: Chunk) -> Chunk:
    """These rows of each.

    A gradient that shares its memory with the logits stays the very same object: torch.compile
    handles that well, and two overlapping views badly.
    """
    logits_CV, teacher_CK, labels_C, dlogits_CV = chunk
    rows_CV = logits_CV[block]
    if dlogits_CV is not None:
        dlogits_CV = rows_CV if dlogits_CV is logits_CV else dlogits_CV[block]
    teacher_CK = None if teacher_CK is None else teacher_CK[block]
    return rows_CV, teacher_CK, labels_C[block], dlogits_CV


def _mark_rows_dynamic(tensors: Chunk) -> None:
    for x in tensors:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)


def _compiled_for(loss: DenseLoss, tensors: Chunk) -> Callable[..., tuple[Tensor, Tensor]]:
    layout = [None if x is None else (x.shape[1:], x.dtype, x.device) for x in tensors]
    return _compiled(loss, *layout, tensors[0] is tensors[3])
