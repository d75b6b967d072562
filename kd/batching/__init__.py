"""How the rows of an optimizer step become micro-batches. See docs/scale.md, "Batches"."""

from kd.batching.config import (
    BatchingConfig,
    BudgetBatching,
    FixedBatching,
    PackedBatching,
    TokenBudgetBatching,
)

__all__ = [
    "BatchingConfig",
    "BudgetBatching",
    "FixedBatching",
    "PackedBatching",
    "TokenBudgetBatching",
]
