"""That the machine can do what everything else needs."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.objective_compile import compile_problem
from kd.objective_loop import _gemm

SHAPES = {"cuda": (1024, 4096, 2560), "cpu": (24, 40, 16)}
"""Rows, columns and the length of the sums."""


def test_machine(device, found):
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found("card", properties.name)
        found("GiB", properties.total_memory / 2**30)
        found("compute capability", f"{properties.major}.{properties.minor}")
        found("CUDA", torch.version.cuda)
    problem = compile_problem(device)
    found("torch.compile", problem or "works")
    assert problem is None


def operands(device: str) -> tuple[Tensor, Tensor]:
    """[M, K] and [K, N] of values that bf16 holds exactly."""
    rows, cols, inner = SHAPES[device]
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU has no such GEMM
    pair = [
        torch.randn(shape, generator=random, device=device).bfloat16().to(dtype)
        for shape in ((rows, inner), (inner, cols))
    ]
    return pair[0], pair[1]


def test_gemms(device, found):
    """As the chunk loop calls them: a transposed head, transposed gradients, rows of the output."""
    a_MK, b_KN = operands(device)
    expected_MN = a_MK.double() @ b_KN.double()
    half = len(a_MK) // 2
    cases = {
        "plain": (a_MK, b_KN),
        "second transposed": (a_MK, b_KN.T.contiguous().T),
        "first transposed": (a_MK.T.contiguous().T, b_KN),
        "first in columns": (torch.cat([a_MK, a_MK], 1)[:, : a_MK.shape[1]], b_KN),
    }
    worst = 0.0
    for name, (a, b) in cases.items():
        for accumulate in (False, True):
            start = 3.0 if accumulate else float("nan")  # at beta 0 the output is not read
            out_MN = torch.full(expected_MN.shape, start, device=device)
            _gemm(a[:half], b, out_MN[:half], accumulate=accumulate)
            _gemm(a[half:], b, out_MN[half:], accumulate=accumulate)
            wanted_MN = expected_MN + 3 if accumulate else expected_MN
            error = relative(out_MN, wanted_MN)
            worst = max(worst, error)
            assert error < 2e-6, f"{name}, beta {int(accumulate)}"
    found("relative error at most", worst)


def relative(x: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = x.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()
