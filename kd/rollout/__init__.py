"""Where the training text comes from."""

from kd.rollout.config import (
    DatasetRollout,
    GeneratedRollout,
    MixedRollout,
    RolloutConfig,
    StudentRollout,
    TeacherRollout,
)
from kd.rollout.dataset import DatasetSource
from kd.rollout.engine import EngineConfig, Policy, Sampling
from kd.rollout.generated import GeneratedSource
from kd.rollout.hf import HFEngineConfig
from kd.rollout.parts import Parts
from kd.rollout.rejections import Rejections
from kd.rollout.vllm import VllmEngineConfig

__all__ = [
    "DatasetRollout",
    "DatasetSource",
    "EngineConfig",
    "GeneratedRollout",
    "GeneratedSource",
    "HFEngineConfig",
    "MixedRollout",
    "Parts",
    "Policy",
    "Rejections",
    "RolloutConfig",
    "Sampling",
    "StudentRollout",
    "TeacherRollout",
    "VllmEngineConfig",
]
