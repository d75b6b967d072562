"""Blocks of a batch: where they are anchored, what the draft reads there, and what it is to say.

Shape legend: B rows, S sequence, A blocks of the row with most, T tokens of a block, Q = A * T
draft positions, N supervised positions of all blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd.copies import copier
from kd.types import Batch, UserError, digest, ids_bytes

LEAST_TOKENS = 2
"""A response has to have: an anchor, and a token to predict from it."""


@dataclass
class Blocks:
    """Of one batch. Position k >= 1 of a block predicts the token at its anchor + k."""

    ids_BQ: Tensor
    """The anchor's token, then MASK."""
    anchors_BA: Tensor
    """Positions in the row, in order; 0 where a block is padding."""
    valid_BA: Tensor
    """False: padding."""
    positions_BQ: Tensor
    """Anchor + 0 .. T - 1."""
    rows_N: Tensor
    """Of the supervised positions in the flattened [B * Q], block after block."""
    labels_N: Tensor
    offsets_N: Tensor
    """k, from 1."""
    block_N: Tensor
    """Which block of the batch it is in, from 0, padding not counted."""
    block_ends: list[int]
    """Where each block ends in [N]: on the host, for chunks that hold whole blocks."""
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Padding not counted."""
        return len(self.block_ends)

    def counts(self) -> list[int]:
        """Supervised positions with k = 1, 2, …, T - 1."""
        found = torch.bincount(self.offsets_N, minlength=self.block_size)
        return found[1:].tolist()

    def to(self, device: torch.device | str) -> Blocks:
        """Copy the tensors; the host does not wait for a GPU."""
        copy = copier(device)
        tensors = {
            field.name: copy(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class BlockMaker:
    """Chooses anchors and builds `Blocks`, on the CPU: on a device it would be a host sync."""

    block_size: int
    mask_token_id: int
    num_anchors: int | None
    """At most so many per row; None: all."""
    seed: int = 0

    def __call__(self, batch: Batch, step: int = 0) -> Blocks:
        """The blocks of every response in the batch.

        Anchors are drawn uniformly without replacement among the response's tokens that have one
        after them, by the seed, the step and the row itself: however rows are spread over ranks and
        micro-batches, they are the same. Raises UserError where a row holds the MASK token.
        """
        starts = [len(response.prompt_ids) for response in batch.responses]
        responses = [response.response_ids for response in batch.responses]
        for response, ids in zip(batch.responses, responses, strict=True):
            if self.mask_token_id in ids or self.mask_token_id in response.prompt_ids:
                raise UserError(
                    f"row {response.sample.id} holds token {self.mask_token_id}, which stands for "
                    "MASK in the draft's blocks: choose another by draft.mask_token_id"
                )
        chosen = [
            self._anchors(ids, step, r.sample.id)
            for ids, r in zip(responses, batch.responses, strict=True)
        ]
        return self.at(chosen, starts, responses, batch.student.input_ids_BS.shape[0])

    def _anchors(self, response_ids: list[int], step: int, name: str) -> list[int]:
        """Offsets into the response."""
        num_possible = len(response_ids) - 1
        if self.num_anchors is None or num_possible <= self.num_anchors:
            return list(range(num_possible))
        seed = digest(f"{self.seed} {step} {name}".encode(), ids_bytes(response_ids))
        rng = np.random.default_rng(int.from_bytes(seed, "little"))
        return sorted(rng.choice(num_possible, self.num_anchors, replace=False).tolist())

    def at(
        self,
        chosen: Sequence[Sequence[int]],
        starts: list[int],
        responses: list[list[int]],
        num_rows: int,
    ) -> Blocks:
        """Blocks anchored at these offsets into the responses, which begin at `starts`.

        `num_rows` may be more than there are responses: a batch may end with a filler row.
        """
        size = self.block_size
        most = max([1, *(len(offsets) for offsets in chosen)])
        anchors_BA = torch.zeros(num_rows, most, dtype=torch.int64)
        valid_BA = torch.zeros(num_rows, most, dtype=torch.bool)
        ids_BAT = torch.full((num_rows, most, size), self.mask_token_id)
        rows: list[int] = []
        labels: list[int] = []
        offsets_N: list[int] = []
        ends: list[int] = []
        block_N: list[int] = []
        for b, (offsets, start, ids) in enumerate(zip(chosen, starts, responses, strict=True)):
            for a, offset in enumerate(offsets):
                anchors_BA[b, a], valid_BA[b, a] = start + offset, True
                ids_BAT[b, a, 0] = ids[offset]
                said = ids[offset + 1 : offset + size]
                first = (b * most + a) * size + 1
                rows += range(first, first + len(said))
                offsets_N += range(1, 1 + len(said))
                block_N += [len(ends)] * len(said)
                labels += said
                ends.append(len(labels))
        positions_BAT = anchors_BA[..., None] + torch.arange(size)
        return Blocks(
            ids_BAT.flatten(1),
            anchors_BA,
            valid_BA,
            positions_BAT.flatten(1),
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(offsets_N, dtype=torch.int64),
            torch.tensor(block_N, dtype=torch.int64),
            ends,
            size,
        )
