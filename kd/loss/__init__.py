"""Divergences and losses on groups, and the objective that the training loop calls."""

from kd.loss.aligned_config import AlignedLossConfig, GOLDConfig, ULDConfig
from kd.loss.config import ForwardKLConfig, JSDConfig, LossConfig, Objective, ReverseKLConfig

__all__ = [
    "AlignedLossConfig",
    "ForwardKLConfig",
    "GOLDConfig",
    "JSDConfig",
    "LossConfig",
    "Objective",
    "ReverseKLConfig",
    "ULDConfig",
]
