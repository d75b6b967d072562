"""DFlash: a small draft that makes a vision-language model decode faster, without changing what it
says.
"""

from kd.dflash.blocks import LEAST_TOKENS, BlockMaker, Blocks
from kd.dflash.config import DraftConfig, TargetConfig
from kd.dflash.draft import ContextCache, Draft
from kd.dflash.evaluate import Walk, acceptance, read_blocks, walks
from kd.dflash.export import draft_config, draft_keys, export_draft, load_draft
from kd.dflash.generate import Decoded, generate
from kd.dflash.loss import DecayWeighting, DPaceWeighting, DraftOutput, Weighting, block_loss
from kd.dflash.target import Target, TargetStates, default_layer_ids

__all__ = [
    "LEAST_TOKENS",
    "BlockMaker",
    "Blocks",
    "ContextCache",
    "DPaceWeighting",
    "DecayWeighting",
    "Decoded",
    "Draft",
    "DraftConfig",
    "DraftOutput",
    "Target",
    "TargetConfig",
    "TargetStates",
    "Walk",
    "Weighting",
    "acceptance",
    "block_loss",
    "default_layer_ids",
    "draft_config",
    "draft_keys",
    "export_draft",
    "generate",
    "load_draft",
    "read_blocks",
    "walks",
]
