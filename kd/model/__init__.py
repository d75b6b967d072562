"""Models: where they come from, how they are frozen and sharded, what they compute."""

from kd.model.compare import check_same_tokenizer, same_rendering
from kd.model.spec import (
    ModelConfig,
    PretrainedModel,
    PretrainedStudent,
    ProcessorConfig,
    ScratchModel,
    TrainedModel,
)
from kd.model.vlm import VLM, FrozenVLM, Student, cut

__all__ = [
    "VLM",
    "FrozenVLM",
    "ModelConfig",
    "PretrainedModel",
    "PretrainedStudent",
    "ProcessorConfig",
    "ScratchModel",
    "Student",
    "TrainedModel",
    "check_same_tokenizer",
    "cut",
    "same_rendering",
]
