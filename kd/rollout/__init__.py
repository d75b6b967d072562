"""Where the training text comes from."""

from kd.rollout.config import RolloutConfig
from kd.rollout.dataset import DatasetRollout, DatasetSource
from kd.rollout.rejections import Rejections

__all__ = ["DatasetRollout", "DatasetSource", "Rejections", "RolloutConfig"]
