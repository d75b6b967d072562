"""Packed rows: several in one sequence, without padding, which must not see each other.

Legend: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kd.copies import copier
from kd.types import Inputs, UserError

Reader = Callable[[Inputs], Tensor | None]
"""Hidden states [N, D] of the target rows; None: the model reads no inputs on these ranks."""

FIRST_TOKENS = 4
"""Of a row, which a convolution or a recurrent state that goes on from the row before reaches."""
LEAK = 0.05
"""Share of what rows do to each other without boundaries that is none."""
ROUNDING = 3.0
"""Times what padding changes, which is none either."""


def row_bounds(inputs: Inputs) -> dict[str, Tensor]:
    """Where packed rows begin, as keyword arguments of the forward beside their positions.

    For the kernels of a recurrence (`cu_seq_lens_q` [rows + 1]) and of a convolution (`seq_idx`
    [1, S]) what transformers hands on to them, for a model whose layers bound rows by it. Without
    the kernels these are ignored or an error, by the version.
    """
    assert inputs.lengths is not None
    lengths, copy = torch.tensor(inputs.lengths), copier(inputs.input_ids_BS.device)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows_1S = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None]
    return {"cu_seq_lens_q": copy(ends), "seq_idx": copy(rows_1S)}


def check_packing(read: Reader, alone: Inputs, padded: Inputs, packed: Inputs, side: str) -> None:
    """Measure, on two rows, that packing keeps them apart. Raises UserError. Collective.

    `alone` is the second row, `padded` and `packed` both. What the second row's hidden states are
    off by is held against two other numbers: what the first row does to them in the same sequence
    without a boundary, and what padding does to them, which is rounding.
    """
    assert packed.lengths is not None
    first, second = packed.lengths
    unbounded = dataclasses.replace(packed, lengths=None, position_ids=None)
    states = [_hidden(read, inputs) for inputs in (alone, padded, packed, unbounded)]
    read_here = [states_SD for states_SD in states if states_SD is not None]
    if not read_here:
        return
    expected_SD, padded_SD, packed_SD, leaking_SD = read_here
    length = padded.input_ids_BS.shape[1]
    padded_SD, packed_SD, leaking_SD = padded_SD[length:], packed_SD[first:], leaking_SD[first:]
    for tokens in (FIRST_TOKENS, second):
        rounding, off, leak = (
            _distance(found_SD[:tokens], expected_SD[:tokens])
            for found_SD in (padded_SD, packed_SD, leaking_SD)
        )
        if not off <= max(LEAK * leak, ROUNDING * rounding):
            raise UserError(
                f"batching=packed: the {side} reads a row otherwise where another comes "
                f"before it in one sequence: its hidden states are off by {off:.1%}\n"
                "Choose batching=token_budget, which pads, or another model"
            )


def _hidden(read: Reader, inputs: Inputs) -> Tensor | None:
    """Of every token."""
    every_N = torch.arange(inputs.input_ids_BS.numel(), device=inputs.input_ids_BS.device)
    return read(dataclasses.replace(inputs, target_rows_N=every_N))


def _distance(found_SD: Tensor, expected_SD: Tensor) -> float:
    """Mean over the tokens, relative."""
    off_S = (found_SD.double() - expected_SD.double()).norm(dim=-1)
    return (off_S / expected_SD.double().norm(dim=-1)).mean().item()
