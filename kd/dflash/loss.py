"""The draft's loss: cross-entropy at each block position, weighted by where it stands.

Σ w · CE / norm, over all blocks of the optimizer step and all ranks. `norm` is known before any
backward, so gradients do not depend on micro-batches, accumulation or ranks.

Shape legend: N supervised positions, C those of a chunk, A blocks, T tokens of a block, D hidden,
V vocabulary.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.dflash.blocks import Blocks
from kd.objective import chunked_objective
from kd.types import UserError


@dataclass
class Weighting:
    """Base of the `draft/weighting` options."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""

    def normaliser(self, counts: list[int], num_blocks: int) -> float:
        """What the sum is divided by, for `counts[k - 1]` positions k of the whole step."""
        raise NotImplementedError

    def weigh(self, ce_C: Tensor, offsets_C: Tensor, block_C: Tensor, block_size: int) -> Tensor:
        """The weight of each position k = `offsets_C` of whole blocks, numbered by `block_C`.

        Without a gradient.
        """
        raise NotImplementedError


@dataclass
class DecayWeighting(Weighting):
    """w_k = exp(-(k - 1) / gamma), over Σ w (DFlash, arXiv:2602.06036, eq. 4)."""

    gamma: float | None = None
    """Null: 4 for blocks of 8, 5 for 10, 7 for 16, in a straight line between and beyond."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise UserError(f"{key}.gamma={self.gamma}: above 0 and finite, or null")

    def resolved_gamma(self, block_size: int) -> float:
        """For blocks of this size."""
        if self.gamma is not None:
            return self.gamma
        return block_size / 2 if block_size <= 10 else 5 + (block_size - 10) / 3

    def normaliser(self, counts: list[int], num_blocks: int) -> float:
        """Σ w."""
        gamma = self.resolved_gamma(len(counts) + 1)
        return math.fsum(count * math.exp(-k / gamma) for k, count in enumerate(counts))

    def weigh(self, ce_C: Tensor, offsets_C: Tensor, block_C: Tensor, block_size: int) -> Tensor:
        """By position alone."""
        return torch.exp(-(offsets_C.to(ce_C.dtype) - 1) / self.resolved_gamma(block_size))


@dataclass
class DPaceWeighting(Weighting):
    """A position weighs what acceptance owes to it now (D-PACE, arXiv:2605.18810, eq. 7-9).

    With q_k the draft's probability of token k and q~ = (1 - alpha) q + alpha,
    w_k = Σ_{m >= k} Π_{i <= m} q~_i; the sum is divided by the number of blocks, as by that of the
    weights what they say of the expected length would cancel.
    """

    alpha: float = 0.5
    """How much every confidence is moved towards 1."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if not 0 <= self.alpha <= 1:
            raise UserError(f"{key}.alpha={self.alpha}: a share, in [0, 1]")

    def normaliser(self, counts: list[int], num_blocks: int) -> float:
        """The number of blocks."""
        return float(num_blocks)

    def weigh(self, ce_C: Tensor, offsets_C: Tensor, block_C: Tensor, block_size: int) -> Tensor:
        """Suffix sums of the prefix products of smoothed confidences."""
        if not len(ce_C):
            return ce_C
        smooth_C = (1 - self.alpha) * torch.exp(-ce_C) + self.alpha
        where = block_C - block_C[0], offsets_C - 1
        # No block has more rows than positions: len(ce_C) rows hold them all, without a sync.
        grid_AT = ce_C.new_zeros(len(ce_C), block_size - 1)  # 0: nothing beyond the response's end
        grid_AT[where] = smooth_C
        reached_AT = grid_AT.cumprod(-1)
        return reached_AT.flip(-1).cumsum(-1).flip(-1)[where]


@dataclass
class BlockBody:
    """Body of the chunk loop: weighted CE of whole blocks, in closed form."""

    blocks: Blocks
    weighting: Weighting
    correct_N: Tensor
    """Filled in: whether the token predicted is the response's."""

    @property
    def narrows_in_place(self) -> bool:
        """It does not."""
        return False

    def row_bytes(self, vocab: int) -> int:
        """Nothing next to the loop's own buffers: the gradient is made in place."""
        return 0

    def __call__(
        self, logits_CV: Tensor, labels_C: Tensor, rows: slice, dlogits_CV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (0, w · CE) of the rows; write the gradient of the second to `dlogits_CV`."""
        blocks = self.blocks
        # Before the logits become their own gradient.
        top = logits_CV.max(-1)
        self.correct_N[rows] = top.indices == labels_C
        # The largest is 0 from here on: a log-sum-exp of large numbers has few digits for them.
        lse_C = logits_CV.sub_(top.values[:, None]).logsumexp(-1)
        ce_C = lse_C - logits_CV.gather(-1, labels_C[:, None])[:, 0]
        weight_C = self.weighting.weigh(
            ce_C, blocks.offsets_N[rows], blocks.block_N[rows], blocks.block_size
        )
        if dlogits_CV is not None:
            logits_CV.sub_(lse_C[:, None]).exp_()
            logits_CV.scatter_add_(1, labels_C[:, None], -torch.ones_like(lse_C)[:, None])
            logits_CV.mul_(weight_C[:, None])
            if dlogits_CV is not logits_CV:
                dlogits_CV.copy_(logits_CV)
        return torch.zeros_like(ce_C), weight_C * ce_C


@dataclass
class DraftOutput:
    """Of one batch."""

    loss: Tensor
    """Differentiable; divided by the norm of the whole step."""
    correct_AT: Tensor
    """[blocks, T - 1] whether token k is the response's; 0 beyond the response's end."""

    @property
    def num_correct_T(self) -> Tensor:
        """[T - 1] blocks whose token k is right."""
        return self.correct_AT.sum(0)

    @property
    def num_accepted_A(self) -> Tensor:
        """[blocks] tokens up to the first wrong one."""
        return self.correct_AT.cumprod(-1).sum(-1)


def block_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    blocks: Blocks,
    weighting: Weighting,
    norm: float,
    chunk_mib: int | None = None,
) -> DraftOutput:
    """Loss of the supervised positions of a batch through the target's head, chunk by chunk.

    No logits of size [N, V] exist; a chunk holds whole blocks. Raises nothing: `blocks` belong to
    the hidden states by construction.
    """
    correct_N = torch.zeros_like(blocks.labels_N, dtype=torch.bool)
    out = chunked_objective(
        hidden_ND,
        weight_VD,
        bias_V,
        blocks.labels_N,
        BlockBody(blocks, weighting, correct_N),
        kd_ratio=0.0,
        num_targets=1,
        budget_mib=chunk_mib,
        cut=lambda most: whole_blocks(blocks.block_ends, most),
    )
    shape = blocks.num_blocks, blocks.block_size - 1
    correct_AT = correct_N.new_zeros(shape, dtype=torch.int64)
    correct_AT[blocks.block_N, blocks.offsets_N - 1] = correct_N.long()
    return DraftOutput(out.loss / norm, correct_AT)


def whole_blocks(ends: list[int], max_rows: int) -> list[slice]:
    """Chunks of at most `max_rows` rows, or of one block that has more."""
    chunks, start = [], 0
    while ends and start < ends[-1]:
        i = bisect.bisect_right(ends, start + max_rows) - 1
        stop = ends[i] if i >= 0 and ends[i] > start else ends[bisect.bisect_right(ends, start)]
        chunks.append(slice(start, stop))
        start = stop
    return chunks
