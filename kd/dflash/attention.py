"""What a draft position sees: the context before its anchor, and its own block.

Block i sees the context at positions strictly before anchor_i, and all of its own block; blocks do
not see each other. A padded block sees itself alone: a row that sees nothing would be NaN.

Shape legend: as in `kd.dflash.draft`; I tiles of queries, J tiles of keys, K keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

KINDS = ("auto", "dense", "flex")
TILE = 128
"""Queries and keys that FlexAttention skips or reads at once."""


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

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block = q // block_size
        before = kv < ends_BA[b, block]
        own = (kv - num_context) // block_size == block
        return torch.where(kv < num_context, before, own)

    num_queries = anchors_BA.shape[1] * block_size
    some_BIJ, all_BIJ = _tiles(ends_BA, num_context, block_size)
    # Not create_block_mask: it writes the whole mask out, unless it is compiled for each shape.
    mask = BlockMask.from_kv_blocks(
        *_ordered(some_BIJ & ~all_BIJ),
        *_ordered(all_BIJ),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(num_queries, num_context + num_queries),
    )
    return FlexAttention(mask)


def _tiles(ends_BA: Tensor, num_context: int, block_size: int) -> tuple[Tensor, Tensor]:
    """[B, I, J] whether some of the pairs of a tile see each other, and whether all do.

    `ends_BA`: where the context of each block ends, at most at `num_context`.
    """
    device, (rows, blocks) = ends_BA.device, ends_BA.shape
    num_queries = blocks * block_size
    num_keys = num_context + num_queries
    start_I = torch.arange(0, num_queries, TILE, device=device)
    stop_I = (start_I + TILE).clamp(max=num_queries)
    start_J = torch.arange(0, num_keys, TILE, device=device)
    stop_J = (start_J + TILE).clamp(max=num_keys)

    # Of the context: up to the latest end among a tile's queries some see, up to the first all.
    ends_BQ = ends_BA.repeat_interleave(block_size, 1)
    beyond = len(start_I) * TILE - num_queries
    latest_BI, first_BI = (
        torch.nn.functional.pad(ends_BQ, (0, beyond), value=value).view(rows, -1, TILE)
        for value in (0, num_context)
    )
    latest_BI, first_BI = latest_BI.amax(-1), first_BI.amin(-1)
    has_context_J = start_J < num_context
    some_BIJ = has_context_J & (start_J < latest_BI[..., None])
    all_BIJ = ~has_context_J | (stop_J.clamp(max=num_context) <= first_BI[..., None])

    # Of the blocks themselves: a tile holds keys and queries of the blocks from low to high.
    low_I, high_I = (start_I // block_size)[:, None], ((stop_I - 1) // block_size)[:, None]
    low_J = (start_J - num_context).clamp(min=0) // block_size
    high_J = (stop_J - num_context - 1) // block_size
    has_own_J = stop_J > num_context
    some_BIJ = some_BIJ | (has_own_J & (low_J <= high_I) & (low_I <= high_J))
    one_IJ = (low_J == high_J) & (low_I == high_I) & (low_I == low_J)
    whole_IJ = (stop_I - start_I == TILE)[:, None] & (stop_J - start_J == TILE)
    return some_BIJ, all_BIJ & (~has_own_J | one_IJ) & whole_IJ


def _ordered(tiles_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, I] how many tiles there are, and [B, 1, I, J] which: those come first, in order."""
    tiles_B1IJ = tiles_BIJ[:, None].to(torch.int32)
    which_B1IJ = tiles_B1IJ.argsort(dim=-1, descending=True, stable=True)
    return tiles_B1IJ.sum(-1, dtype=torch.int32), which_B1IJ.to(torch.int32)


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
