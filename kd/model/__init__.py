"""Models: where they come from, how they are frozen and sharded, what they compute."""

from kd.model.compare import (
    ALIGNMENTS,
    Pairing,
    pair,
    rendering_digest,
    same_rendering,
    tokenizer_difference,
    tokenizer_digest,
)
from kd.model.export import export, gather
from kd.model.kernels import Kernels, layer_functions
from kd.model.lora import LoRAConfig
from kd.model.packing import Reader, check_packing
from kd.model.positions import FindPositions, Positions, left_to_the_forward
from kd.model.processor import ProcessorConfig, check_images
from kd.model.spec import (
    ModelConfig,
    PretrainedModel,
    PretrainedStudent,
    ScratchModel,
    TrainedModel,
)
from kd.model.stream import TensorSpec, WeightStream
from kd.model.vlm import VLM, FrozenVLM, Student, cut

__all__ = [
    "ALIGNMENTS",
    "VLM",
    "FindPositions",
    "FrozenVLM",
    "Kernels",
    "LoRAConfig",
    "ModelConfig",
    "Pairing",
    "Positions",
    "PretrainedModel",
    "PretrainedStudent",
    "ProcessorConfig",
    "Reader",
    "ScratchModel",
    "Student",
    "TensorSpec",
    "TrainedModel",
    "WeightStream",
    "check_images",
    "check_packing",
    "cut",
    "export",
    "gather",
    "layer_functions",
    "left_to_the_forward",
    "pair",
    "rendering_digest",
    "same_rendering",
    "tokenizer_difference",
    "tokenizer_digest",
]
