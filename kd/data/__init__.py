"""Rows of data sets, and the batches made of them."""

from kd.data.base import DataConfig, RowError, Rows
from kd.data.collate import Collator
from kd.data.conversations import ConversationsConfig
from kd.data.digits import DigitsConfig
from kd.data.medpix import MedPixConfig
from kd.data.mixture import MixtureConfig, ranges_of, sizes_of
from kd.data.render import Prompt, Renderer
from kd.data.sampler import Split
from kd.data.stream import BatchStream, validation_batches

__all__ = [
    "BatchStream",
    "Collator",
    "ConversationsConfig",
    "DataConfig",
    "DigitsConfig",
    "MedPixConfig",
    "MixtureConfig",
    "Prompt",
    "Renderer",
    "RowError",
    "Rows",
    "Split",
    "ranges_of",
    "sizes_of",
    "validation_batches",
]
