"""The dense loss of a chunk as a pair of Triton kernels, one program per row.

Sweep 1 goes through both rows of logits once: log-sum-exps by running maxima, and the divergence as
a moment on the way (the JSD, whose mixture needs the log-sum-exps, goes through them once more).
Sweep 2 writes the gradient over the student's logits, also where its dtype is narrower.

Formulas: `kd.objective_dense`, by which this is tested. In float64 all of it is float64.

Shape legend: C rows of a chunk, V student vocabulary, K the vocabulary prefix both models share.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kd.objective_compile import Chunk
from kd.objective_dense import DenseLoss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs its kernels in Python then, on tensors of a CPU."""

BLOCK, NUM_WARPS = 2048, 8

FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FORMULAS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}

LOWEST = tl.constexpr(-1e30)
"""A maximum of nothing: finite, as -inf - -inf is NaN."""
ABSENT = tl.constexpr(-1e4)
"""Log-prob below which even an fp64 probability is 0."""

NUM_STATS = 7
"""Per row: the maximum and the log-sum-exp below it of the student, of its prefix, and of the
teacher, and what the gradient subtracts: <q, g> of reverse KL, <q, u> of the JSD."""


@triton.jit
def _add(maximum, total, x, temperature: tl.constexpr):
    """Running maximum and Σ exp((x - maximum) / temperature), per lane; the old sum's factor."""
    new = tl.maximum(maximum, x)
    factor = tl.exp((maximum - new) / temperature)
    weight = tl.exp((x - new) / temperature)
    return new, total * factor + weight, factor, weight


@triton.jit
def _scaled(total, factor):
    """`total * factor`; nothing is left of it where the factor is 0, be it infinite."""
    return tl.where(factor == 0, 0.0, total * factor)


@triton.jit
def _combined(maximum, total, temperature: tl.constexpr):
    """The lanes as one: maximum, sum, and every lane's factor."""
    top = tl.max(maximum, 0)
    factor = tl.exp((maximum - top) / temperature)
    return top, tl.sum(total * factor, 0), factor


@triton.jit
def _finite_maximum(x):
    top = tl.max(x, 0)
    return tl.where(top > LOWEST, top, 0.0)


@triton.jit
def _log_prob(x, maximum, log_sum, temperature: tl.constexpr):
    return (x - maximum) / temperature - log_sum


@triton.jit
def _log_mixture(logq, logp, beta: tl.constexpr, tiny: tl.constexpr):
    return tl.log(tl.maximum(beta * tl.exp(logp) + (1 - beta) * tl.exp(logq), tiny))


@triton.jit
def _jsd_sums(
    z_row, t_row, shared, z_top, z_log, t_top, t_log,
    temperature: tl.constexpr, beta: tl.constexpr, tiny: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ p (log p - log m) and <q, u>, u = (1 - beta)(log q - log m)."""
    lanes = tl.arange(0, BLOCK)
    teacher = tl.zeros([BLOCK], z_row.dtype.element_ty)
    student = tl.zeros([BLOCK], z_row.dtype.element_ty)
    for start in range(0, shared, BLOCK):
        at = start + lanes
        z = tl.load(z_row + at, at < shared, -float("inf"))
        t = tl.load(t_row + at, at < shared, -float("inf"))
        logq = tl.maximum(_log_prob(z, z_top, z_log, temperature), ABSENT)
        logp = tl.maximum(_log_prob(t, t_top, t_log, temperature), ABSENT)
        logm = _log_mixture(logq, logp, beta, tiny)
        teacher += tl.exp(logp) * (logp - logm)
        student += tl.exp(logq) * ((1 - beta) * (logq - logm))
    return tl.sum(teacher, 0), tl.sum(student, 0)


@triton.jit
def _losses(
    z_ptr, t_ptr, labels_ptr, kd_ptr, ce_ptr, stats_ptr, vocab, shared, z_stride, t_stride,
    temperature: tl.constexpr, beta: tl.constexpr, tiny: tl.constexpr, formula: tl.constexpr,
    has_teacher: tl.constexpr, same: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 1: kd_C, ce_C and the statistics of a row. `same`: T = 1 and K = V, one softmax."""
    row = tl.program_id(0).to(tl.int64)
    z_row, t_row = z_ptr + row * z_stride, t_ptr + row * t_stride
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    z_max, z_sum = zero + LOWEST, zero
    k_max, k_sum = zero + LOWEST, zero
    t_max, t_sum = zero + LOWEST, zero
    moment = zero  # Σ w ((t - t_shift) - (z - z_shift)) / T, w the unnormalised p or q of the lane
    z_shift = _finite_maximum(tl.load(z_row + lanes, lanes < shared, -float("inf")))
    t_shift = z_shift
    if has_teacher:
        t_shift = _finite_maximum(tl.load(t_row + lanes, lanes < shared, -float("inf")))
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        z = tl.load(z_row + at, at < vocab, -float("inf"))
        z_max, z_sum, z_factor, z_weight = _add(z_max, z_sum, z, 1.0)
        if has_teacher:
            in_both = at < shared
            t = tl.load(t_row + at, in_both, -float("inf"))
            t_max, t_sum, t_factor, t_weight = _add(t_max, t_sum, t, temperature)
            q_factor, q_weight = z_factor, z_weight
            if not same:
                z = tl.where(in_both, z, -float("inf"))
                k_max, k_sum, q_factor, q_weight = _add(k_max, k_sum, z, temperature)
            gap = ((t - t_shift) - (z - z_shift)) / temperature
            if formula == FORWARD_KL:
                moment = _scaled(moment, t_factor) + tl.where(t_weight == 0, 0.0, t_weight * gap)
            if formula == REVERSE_KL:
                moment = _scaled(moment, q_factor) + tl.where(q_weight == 0, 0.0, q_weight * gap)
    z_top, z_total, q_factor = _combined(z_max, z_sum, 1.0)
    z_log = tl.log(z_total)
    label = tl.load(labels_ptr + row)
    z_label = tl.load(z_row + tl.maximum(label, 0))
    tl.store(ce_ptr + row, tl.where(label >= 0, z_log - (z_label - z_top), 0.0))
    stats_row = stats_ptr + row * NUM_STATS
    tl.store(stats_row, z_top)
    tl.store(stats_row + 1, z_log)
    if has_teacher:
        k_top, k_total, k_log = z_top, z_total, z_log
        if not same:
            k_top, k_total, q_factor = _combined(k_max, k_sum, temperature)
            k_log = tl.log(k_total)
        t_top, t_total, t_factor = _combined(t_max, t_sum, temperature)
        t_log = tl.log(t_total)
        # What (log p - log q) has besides the gap above.
        rest = ((t_top - t_shift) - (k_top - z_shift)) / temperature + (t_log - k_log)
        if formula == FORWARD_KL:
            mean = tl.sum(_scaled(moment, t_factor), 0) / t_total  # pyright: ignore
            value = mean - rest
            subtracted = value
        elif formula == REVERSE_KL:
            mean = tl.sum(_scaled(moment, q_factor), 0) / k_total  # pyright: ignore
            value = rest - mean
            subtracted = value
        else:
            teacher, subtracted = _jsd_sums(
                z_row, t_row, shared, k_top, k_log, t_top, t_log, temperature, beta, tiny, BLOCK
            )
            value = beta * teacher + subtracted
        tl.store(kd_ptr + row, value * (temperature * temperature))
        tl.store(stats_row + 2, k_top)
        tl.store(stats_row + 3, k_log)
        tl.store(stats_row + 4, t_top)
        tl.store(stats_row + 5, t_log)
        tl.store(stats_row + 6, subtracted)


@triton.jit
def _slope(
    logq, logp, subtracted, beta: tl.constexpr, tiny: tl.constexpr, formula: tl.constexpr
):  # fmt: skip
    """dD/da with a = student logits / temperature."""
    if formula == FORWARD_KL:
        return tl.exp(logq) - tl.exp(logp)
    if formula == JSD:
        logq, logp = tl.maximum(logq, ABSENT), tl.maximum(logp, ABSENT)
        value = (1 - beta) * (logq - _log_mixture(logq, logp, beta, tiny))
    else:
        value = logq - logp
    q = tl.exp(logq)
    return tl.where(q == 0, 0.0, q * (value - subtracted))


@triton.jit
def _gradient(
    z_ptr, t_ptr, labels_ptr, stats_ptr, grad_ptr, vocab, shared, z_stride, t_stride, grad_stride,
    temperature: tl.constexpr, beta: tl.constexpr, tiny: tl.constexpr, formula: tl.constexpr,
    kd_ratio: tl.constexpr, has_teacher: tl.constexpr, same: tl.constexpr,
    NUM_STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 2: the gradient of a row, which may begin where the row of logits begins.

    Entry j of a narrower gradient lies over logits up to j alone, and these have been read: blocks
    ascend, and within one block all lanes read before any of them writes.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row, t_row = z_ptr + row * z_stride, t_ptr + row * t_stride
    stats_row = stats_ptr + row * NUM_STATS
    label = tl.load(labels_ptr + row)
    z_top, z_log = tl.load(stats_row), tl.load(stats_row + 1)
    if has_teacher:
        k_top, k_log = tl.load(stats_row + 2), tl.load(stats_row + 3)
        t_top, t_log = tl.load(stats_row + 4), tl.load(stats_row + 5)
        subtracted = tl.load(stats_row + 6)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + at, at < vocab, -float("inf"))
        grad = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
        if has_teacher:
            in_both = at < shared
            t = tl.load(t_row + at, in_both, -float("inf"))
            logq = _log_prob(z, k_top, k_log, temperature)
            logp = _log_prob(t, t_top, t_log, temperature)
            slope = _slope(logq, logp, subtracted, beta, tiny, formula)
            grad = tl.where(in_both, slope * (kd_ratio * temperature), 0.0)
        if kd_ratio < 1:
            q = tl.exp(_log_prob(z, z_top, z_log, 1.0))
            ce = tl.where(at == label, q - 1, q) * (1 - kd_ratio)
            grad += tl.where(label >= 0, ce, 0.0)
        tl.debug_barrier()
        tl.store(grad_ptr + row * grad_stride + at, grad.to(grad_ptr.dtype.element_ty), at < vocab)


def run_triton(chunk: Chunk, loss: DenseLoss) -> tuple[Tensor, Tensor]:
    """(kd_C, ce_C) of a chunk; the gradient of their mix goes to its `dlogits_CV`, if there is one.

    The rows of logits are contiguous. `dlogits_CV` is the logits themselves, memory of its own, or
    of fewer bytes per entry with every row beginning where that of the logits begins.
    """
    logits_CV, teacher_CK, labels_C, dlogits_CV = chunk
    (rows, vocab), has_teacher = logits_CV.shape, teacher_CK is not None
    kd_C, ce_C = logits_CV.new_zeros(2, rows)
    if not rows:
        return kd_C, ce_C
    stats = logits_CV.new_empty(rows, NUM_STATS)
    teacher_CK = logits_CV if teacher_CK is None else teacher_CK
    shared = teacher_CK.shape[1]
    strides = logits_CV.stride(0), teacher_CK.stride(0)
    fixed = {
        "temperature": loss.temperature,
        "beta": loss.beta,
        "tiny": torch.finfo(logits_CV.dtype).tiny,
        "formula": FORMULAS[loss.formula],
        "has_teacher": has_teacher,
        "same": loss.temperature == 1 and shared == vocab,
        "NUM_STATS": NUM_STATS,
        "BLOCK": min(BLOCK, triton.next_power_of_2(vocab)),
        "num_warps": NUM_WARPS,
    }
    tensors = logits_CV, teacher_CK, labels_C
    with torch.cuda.device_of(logits_CV):
        _losses[(rows,)](*tensors, kd_C, ce_C, stats, vocab, shared, *strides, **fixed)
        if dlogits_CV is not None:
            sizes = vocab, shared, *strides, dlogits_CV.stride(0)
            gradient = {"kd_ratio": loss.kd_ratio, **fixed}
            _gradient[(rows,)](*tensors, stats, dlogits_CV, *sizes, **gradient)
    return kd_C, ce_C
