"""Models: where they come from, how they are frozen and sharded, what they compute."""

from kd.model.compare import check_same_tokenizer, same_rendering
from kd.model.spec import ModelConfig, PretrainedModel, ProcessorConfig, ScratchModel
from kd.model.vlm import VLM, FrozenVLM, Student

__all__ = [
    "VLM",
    "FrozenVLM",
    "ModelConfig",
    "PretrainedModel",
    "ProcessorConfig",
    "ScratchModel",
    "Student",
    "check_same_tokenizer",
    "same_rendering",
]
