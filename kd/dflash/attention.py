"""What a draft position sees: the context before its anchor, and its own block.

Block i sees the context at positions strictly before anchor_i, and all of its own block; blocks do
not see each other. A padded block sees itself alone: a row that sees nothing would be NaN.

Shape legend: as in `kd.dflash.draft`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

KINDS = ("auto", "dense", "flex")


@dataclass(frozen=True)
class DenseAttention:
    """By a mask [B, 1, Q, S + Q], which is small where rows or blocks are few."""

    seen_B1QK: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `kd.dflash.draft.Attend`."""
        return scaled_dot_product_attention(
            query, key, value, attn_mask=self.seen_B1QK, enable_gqa=True
        )


@dataclass(frozen=True)
class FlexAttention:
    """By a block-sparse mask, which is never written out: for hundreds of blocks on a GPU."""

    mask: BlockMask

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `kd.dflash.draft.Attend`."""
        attend = _compiled() if query.is_cuda else flex_attention
        return attend(query, key, value, block_mask=self.mask, enable_gqa=True)


def dense(
    anchors_BA: Tensor, valid_BA: Tensor, num_context: int, block_size: int
) -> DenseAttention:
    """`DenseAttention` of blocks at `anchors_BA` (padding: `valid_BA` is False)."""
    device = anchors_BA.device
    context = torch.arange(num_context, device=device)
    before_BAS = (context < anchors_BA[..., None]) & valid_BA[..., None]
    before_BQS = before_BAS.repeat_interleave(block_size, 1)
    block_Q = torch.arange(anchors_BA.shape[1], device=device).repeat_interleave(block_size)
    own_BQQ = (block_Q[:, None] == block_Q).expand(len(anchors_BA), -1, -1)
    return DenseAttention(torch.cat([before_BQS, own_BQQ], -1)[:, None])


def flex(anchors_BA: Tensor, valid_BA: Tensor, num_context: int, block_size: int) -> FlexAttention:
    """The same as `dense`, as a FlexAttention mask."""
    # A padded block's context ends at 0.
    ends_BA = torch.where(valid_BA, anchors_BA, torch.zeros_like(anchors_BA))
    rows, blocks = anchors_BA.shape

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block = q // block_size
        before = kv < ends_BA[b, block]
        own = (kv - num_context) // block_size == block
        return torch.where(kv < num_context, before, own)

    num_queries = blocks * block_size
    mask = create_block_mask(
        sees, rows, None, num_queries, num_context + num_queries, device=str(anchors_BA.device)
    )
    return FlexAttention(mask)


def attention(
    kind: str, anchors_BA: Tensor, valid_BA: Tensor, num_context: int, block_size: int
) -> DenseAttention | FlexAttention:
    """The kind asked for; auto: FlexAttention on a GPU, else a dense mask."""
    if kind == "flex" or (kind == "auto" and anchors_BA.is_cuda):
        return flex(anchors_BA, valid_BA, num_context, block_size)
    return dense(anchors_BA, valid_BA, num_context, block_size)


@functools.cache
def _compiled() -> Callable:
    """Uncompiled, FlexAttention writes all scores out."""
    return torch.compile(flex_attention, dynamic=True)
