"""Responses in two tokenizers: what their tokens spell, where they meet, and targets on that."""

from kd.align.aligner import AlignedResponse, Aligner
from kd.align.alignment import Alignment, Group, align, matched_vocabulary, teacher_response
from kd.align.targets import (
    NEEDS_ALIGNED_LOSS,
    AlignedTargets,
    Groups,
    MatchedVocabulary,
    Side,
)
from kd.align.tokens import TokenBytes, Unaligned

__all__ = [
    "NEEDS_ALIGNED_LOSS",
    "AlignedResponse",
    "AlignedTargets",
    "Aligner",
    "Alignment",
    "Group",
    "Groups",
    "MatchedVocabulary",
    "Side",
    "TokenBytes",
    "Unaligned",
    "align",
    "matched_vocabulary",
    "teacher_response",
]
