"""Divergences, and the objective that the training loop calls."""

from kd.loss.config import ForwardKLConfig, JSDConfig, LossConfig, Objective, ReverseKLConfig

__all__ = ["ForwardKLConfig", "JSDConfig", "LossConfig", "Objective", "ReverseKLConfig"]
