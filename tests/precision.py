"""How far results may be apart that differ by nothing but the order in which float32 adds them up.

Processors, threads, batch shapes and ranks all change that order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


def rounding(model: nn.Module) -> float:
    """The difference of two such results of `model`, relative to their norm.

    A sum of n products is off by about sqrt(n) units of roundoff of its norm, as rounding errors
    are independent of each other (N. J. Higham, Accuracy and Stability of Numerical Algorithms,
    2002, section 2.8). One such sum follows another in every layer that has weights, each adds its
    error, and there are two results. Wrong rows or positions differ by thousands of times as much.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    terms = max(p[0].numel() for p in matrices)
    return 2 * len(matrices) * terms**0.5 * UNIT_ROUNDOFF


def assert_same_rows(found_ND: Tensor, wanted_ND: Tensor, model: nn.Module) -> None:
    """Each row is that of `model`, but for rounding."""
    assert found_ND.shape == wanted_ND.shape
    error_N = (found_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)
    assert (error_N <= rounding(model)).all(), (error_N.max(), rounding(model))


def log_prob_rounding(logits_NV: Tensor, model: nn.Module) -> float:
    """The difference of two log-probabilities made of these logits: that of two logits."""
    return 2 * rounding(model) * logits_NV.norm(dim=-1).max().item()
