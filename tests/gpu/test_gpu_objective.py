"""The fused objective against float64, and without a host sync.

Shape legend: N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.loss import ForwardKLConfig, JSDConfig, ReverseKLConfig
from kd.loss.config import LossConfig
from kd.objective import CompilePolicy, Kernel
from kd.types import DenseTargets
from tests.gpu.test_gpu_basics import relative
from tests.test_objective import divergence_of

LOSSES = {"forward_kl": ForwardKLConfig, "reverse_kl": ReverseKLConfig, "jsd": JSDConfig}
TEMPERATURE, KD_RATIO = 2.0, 0.3


def policy(kernel: Kernel) -> CompilePolicy:
    """So that what does not compile fails."""
    return CompilePolicy.always if kernel is Kernel.compiled else CompilePolicy.never


@dataclass(frozen=True)
class Sizes:
    rows: int
    student: int
    teacher: int
    vocab: int
    chunk_mib: int
    """So that there are several chunks."""


SIZES = {"cuda": Sizes(600, 256, 384, 32_768, 64), "cpu": Sizes(40, 16, 24, 17_000, 1)}


@dataclass
class Case:
    """Leaves of the student, and the teacher, whose vocabulary has some entries fewer."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    teacher: DenseTargets


def make_case(device: str) -> Case:
    """bf16, logits of a few units; every third row without a reference answer."""
    sizes, random = SIZES[device], torch.Generator(device).manual_seed(0)

    def randn(rows: int, cols: int, scale: float) -> Tensor:
        x = torch.randn(rows, cols, generator=random, device=device)
        return (x * scale).bfloat16()

    shared = sizes.vocab - 40
    labels_N = torch.randint(shared, (sizes.rows,), generator=random, device=device)
    labels_N[::3] = -100
    return Case(
        randn(sizes.rows, sizes.student, 1).requires_grad_(),
        randn(sizes.vocab, sizes.student, 2 * sizes.student**-0.5).requires_grad_(),
        labels_N,
        DenseTargets(
            randn(sizes.rows, sizes.teacher, 1),
            randn(shared, sizes.teacher, 2 * sizes.teacher**-0.5),
            None,
        ),
    )


def loss_of(case: Case, config: LossConfig) -> Tensor:
    """By the objective that a run with this config has."""
    objective, count = config.build(KD_RATIO), len(case.labels_N)
    leaves = case.hidden_ND, case.weight_VD, None
    return objective(*leaves, case.labels_N, case.teacher, count).loss


def reference(case: Case, divergence: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in float64, from the definition and whole logits."""
    leaves = [x.detach().double().requires_grad_() for x in (case.hidden_ND, case.weight_VD)]
    logits_NV = leaves[0] @ leaves[1].T
    teacher_NV = case.teacher.hidden_ND.double() @ case.teacher.weight_VD.double().T
    pair = logits_NV[:, : teacher_NV.shape[1]] / TEMPERATURE, teacher_NV / TEMPERATURE
    kd = TEMPERATURE**2 * divergence_of(*pair, divergence, 0.5).sum()
    ce = F.cross_entropy(logits_NV, case.labels_N, reduction="sum")  # leaves -100 out
    loss = ((1 - KD_RATIO) * ce + KD_RATIO * kd) / len(case.labels_N)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kernel", Kernel)
def test_against_float64(device, found, kernel):
    if kernel is Kernel.triton and device == "cpu":
        pytest.skip("in Triton's interpreter: tests/loss/test_triton.py")
    case, sizes = make_case(device), SIZES[device]
    # Compiling takes most of the time on a CPU: one loss there.
    for divergence in LOSSES if device == "cuda" else ["jsd"]:
        options = {"temperature": TEMPERATURE, "chunk_mib": sizes.chunk_mib}
        config = LOSSES[divergence](**options, kernel=kernel, compile=policy(kernel))
        loss = loss_of(case, config)
        grads = torch.autograd.grad(loss, [case.hidden_ND, case.weight_VD])
        wanted, wanted_grads = reference(case, divergence)
        error = relative(loss.detach(), wanted)
        errors = [relative(*pair) for pair in zip(grads, wanted_grads, strict=True)]
        found(
            f"{divergence} {kernel.value}: loss, hidden, head",
            [f"{x:.1e}" for x in (error, *errors)],
        )
        assert error < 1e-5, divergence
        assert max(errors) < 5e-3, divergence


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", Kernel)
def test_no_host_sync(cuda, found, kernel):
    """The second time: compiling may wait for the device."""
    case = make_case(cuda)
    for divergence, make in LOSSES.items():
        config = make(temperature=TEMPERATURE, chunk_mib=64, kernel=kernel, compile=policy(kernel))
        loss_of(case, config).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_of(case, config).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found(f"{divergence} {kernel.value}", "none")
