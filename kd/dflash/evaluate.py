"""Accept lengths without decoding: from one forward of the target over prompt and response.

Decoding with a draft gives the target's own greedy response, so what each step would accept follows
from what the draft says at every token of that response.

Shape legend: as in `kd.dflash.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kd.dflash.attention import attention
from kd.dflash.blocks import Blocks
from kd.dflash.draft import Draft
from kd.dflash.loss import DraftOutput, Weighting, block_loss
from kd.dflash.target import TargetStates


@dataclass
class Walk:
    """Decoding one response, as it would go."""

    accepted: list[int]
    """Tokens of the draft that each step accepts."""
    num_tokens: int
    """Of the response after its first, which the prompt's forward gives."""

    @property
    def accept_length(self) -> float:
        """Tokens per step; what the end of the response cuts off does not count."""
        return self.num_tokens / len(self.accepted)


def read_blocks(
    draft: Draft,
    states: TargetStates,
    blocks: Blocks,
    weighting: Weighting,
    norm: float,
    kind: str = "auto",
) -> DraftOutput:
    """What the draft says at the blocks of a batch, on one device, and its loss."""
    rows, length = states.taps_BSM.shape[:2]
    context = torch.arange(length, device=states.taps_BSM.device).expand(rows, -1)
    attend = attention(kind, blocks.anchors_BA, blocks.valid_BA, length, blocks.block_size)
    hidden_BQD = draft(states.taps_BSM, states.embeds_BQD, context, blocks.positions_BQ, attend)
    hidden_ND = hidden_BQD.flatten(0, 1)[blocks.rows_N]
    hidden_ND = hidden_ND.to(states.weight_VD.dtype)
    return block_loss(hidden_ND, states.weight_VD, states.bias_V, blocks, weighting, norm)


def walks(correct_AT: torch.Tensor, lengths: list[int]) -> list[Walk]:
    """Of responses with these lengths, from blocks at each of their tokens but the last.

    `correct_AT` are the blocks of all responses, one after another, as `DraftOutput` gives them.
    """
    accepted_A = correct_AT.cumprod(-1).sum(-1).tolist()
    found, start = [], 0
    for length in lengths:
        steps, at = [], 0
        while at < length - 1:
            steps.append(accepted_A[start + at])
            at += steps[-1] + 1
        found.append(Walk(steps, length - 1))
        start += length - 1
    return found


def acceptance(found: list[Walk], block_size: int) -> list[tuple[int, int]]:
    """(accepted, possible) steps per position k = 1 … T - 1; possible: the response goes so far."""
    counts = [[0, 0] for _ in range(block_size - 1)]
    for walk in found:
        at = 0
        for accepted in walk.accepted:
            for k in range(min(block_size - 1, walk.num_tokens - at)):
                counts[k][0] += accepted > k
                counts[k][1] += 1
            at += accepted + 1
    return [(accepted, possible) for accepted, possible in counts]
