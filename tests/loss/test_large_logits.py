"""Logits far from 0 keep their digits in float32: every loss against float64 on the same logits.

The head's GEMM adds no error: hidden states are unit vectors, so that the head holds the logits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kd.align import AlignedTargets
from kd.dflash import BlockMaker, DecayWeighting, block_loss
from kd.loss import ForwardKLConfig, GOLDConfig, JSDConfig, LossConfig, ReverseKLConfig, ULDConfig
from kd.objective import CompilePolicy
from kd.teacher.payload import top_k
from kd.teacher.sparse import SparseTargets
from kd.types import DenseTargets, TeacherTargets

ROWS, VOCAB, BOUND = 12, 1500, 5e-4
SIZES = list(itertools.product([1.0, 30.0, 300.0], [0.0, 1000.0]))
LOSSES = {
    "forward_kl": ForwardKLConfig,
    "reverse_kl": ReverseKLConfig,
    "jsd": JSDConfig,
    "uld": ULDConfig,
    "gold": GOLDConfig,
}


def make_logits(spread: float, offset: float, seed: int = 0) -> Tensor:
    """Of float32, with close runners-up, so that more than one token of a row counts."""
    g = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(ROWS, VOCAB, generator=g, dtype=torch.float64) * spread + offset
    top_N1 = logits_NV.max(-1, keepdim=True).values
    few_N3 = torch.randint(VOCAB, (ROWS, 3), generator=g)
    close_N3 = top_N1 - torch.rand(ROWS, 3, generator=g, dtype=torch.float64) * 3
    return logits_NV.scatter(1, few_N3, close_N3).float()


def run(
    config: LossConfig, student_NV: Tensor, targets: TeacherTargets, dtype: torch.dtype
) -> tuple[float, Tensor]:
    """The loss and its gradient by the logits."""
    weight_VN = student_NV.T.to(dtype, copy=True).requires_grad_()
    labels_N = torch.arange(ROWS) * 7
    one_hot = torch.eye(ROWS, dtype=dtype)
    out = config.build(0.5)(one_hot, weight_VN, None, labels_N, targets, ROWS)
    (gradient_VN,) = torch.autograd.grad(out.loss, weight_VN)
    return out.loss.item(), gradient_VN


def dense(teacher_NV: Tensor, dtype: torch.dtype) -> DenseTargets:
    return DenseTargets(torch.eye(ROWS, dtype=dtype), teacher_NV.T.to(dtype))


def assert_close(found: tuple[float, Tensor], wanted: tuple[float, Tensor]) -> None:
    assert abs(found[0] - wanted[0]) <= BOUND * abs(wanted[0])
    assert (found[1] - wanted[1]).abs().max() <= BOUND * wanted[1].abs().max()


@pytest.mark.parametrize(("spread", "offset"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_dense_targets(name, temperature, spread, offset):
    student, teacher = make_logits(spread, offset), make_logits(spread, offset, seed=1)
    if name in ("forward_kl", "reverse_kl", "jsd"):
        # Where the teacher likes what the student does, and not something far away alone.
        teacher = teacher.where(
            torch.rand(ROWS, 1) < 0.5, student + 0.3 * torch.randn_like(student)
        )
    config = LOSSES[name](temperature=temperature, compile=CompilePolicy.never)
    found, wanted = (
        run(config, student, dense(teacher, dtype), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize(("spread", "offset"), SIZES)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_targets(name, spread, offset):
    student, teacher = make_logits(spread, offset), make_logits(spread, offset, seed=1)
    results = []
    for dtype in (torch.float32, torch.float64):
        ids_N = torch.arange(ROWS) * 7
        top = top_k(dense(teacher, dtype), ids_N, 8, 2.0, VOCAB)
        targets = SparseTargets(top, ids_N, VOCAB, 2.0)
        results.append(run(LOSSES[name](temperature=2.0), student, targets, dtype))
    assert_close(*results)


@pytest.mark.parametrize(("spread", "offset"), SIZES)
def test_drafts(spread, offset):
    blocks = BlockMaker(5, VOCAB - 1, None).at([[0, 4, 8]], [1], [list(range(13))], 1)
    assert len(blocks.labels_N) == ROWS
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden = torch.eye(ROWS, dtype=dtype, requires_grad=True)
        weight_VN = make_logits(spread, offset).T.to(dtype, copy=True).requires_grad_()
        loss = block_loss(hidden, weight_VN, None, blocks, DecayWeighting(), 3.0).loss
        results.append((loss.item(), torch.autograd.grad(loss, weight_VN)[0]))
    assert_close(*results)


def test_the_bound_is_missed_without_the_maximum():
    """What is tested can be seen: a log-sum-exp of these logits has too few digits."""
    logits_NV = make_logits(300.0, 1000.0)
    plain_N = (logits_NV - logits_NV.logsumexp(-1, keepdim=True)).exp().max(-1).values
    exact_N = logits_NV.double().softmax(-1).max(-1).values
    assert (plain_N - exact_N).abs().max() > 1e-5
    assert (logits_NV.log_softmax(-1).exp().max(-1).values - exact_N).abs().max() < 1e-6


def test_aligned_losses_see_dense_targets_as_groups():
    """Each token is a group of its own there, of dense targets."""
    targets = AlignedTargets.one_to_one(dense(make_logits(1.0, 0.0), torch.float32), VOCAB)
    assert len(targets.groups.student.ids_R) == ROWS
