"""Packed rows: several in one sequence, without padding, which must not see each other.

Legend: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from kd.types import Inputs, UserError

Reader = Callable[[Inputs], Tensor | None]
"""Hidden states [N, D] of the target rows; None: the model reads no inputs on these ranks."""

FIRST_TOKENS = 4
"""Of a row, which a convolution or a recurrent state that goes on from the row before reaches."""
LEAK = 0.05
"""Share of what rows do to each other without boundaries that is none."""
ROUNDING = 3.0
"""Times what padding changes, which is none either."""


def packed_inputs(
    model: PreTrainedModel, inputs: Inputs, *, bounds_rows: bool
) -> dict[str, Tensor]:
    """Where packed rows begin, as keyword arguments of the model's forward.

    Positions for attention; for the kernels of a recurrence (`cu_seq_lens_q` [rows + 1]) and of a
    convolution (`seq_idx` [1, S]) what transformers hands on to them, if the model's layers
    `bounds_rows`. Without the kernels these are ignored or an error, by the version.
    """
    assert inputs.lengths is not None
    positions = {"position_ids": row_positions(model, inputs)}
    if not bounds_rows:
        return positions
    lengths = torch.tensor(inputs.lengths, dtype=torch.int32)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows_1S = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None]
    device = inputs.input_ids_BS.device
    return {**positions, "cu_seq_lens_q": ends.to(device), "seq_idx": rows_1S.to(device)}


def row_positions(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Positions of packed rows, from 0 in each: [1, S], or [4, 1, S] for models with M-RoPE.

    Where positions begin anew is where transformers bounds the attention, if there is no mask. The
    first of the four is that of the text, which only bounds; the others are time, height and width
    (Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1), which images let grow unevenly.
    """
    assert inputs.lengths is not None
    device = inputs.input_ids_BS.device
    text_S = torch.cat([torch.arange(n, device=device) for n in inputs.lengths])
    multimodal = getattr(model.base_model, "get_rope_index", None)
    if multimodal is None or "image_grid_thw" not in inputs.media:
        return text_S[None]
    ids_BS, types_BS, mask_BS = (
        pad_sequence(x_1S[0].split(inputs.lengths), batch_first=True)
        for x_1S in (
            inputs.input_ids_BS,
            inputs.media["mm_token_type_ids"],
            inputs.attention_mask_BS,
        )
    )
    positions_3BS, _ = multimodal(
        input_ids=ids_BS,
        mm_token_type_ids=types_BS,
        image_grid_thw=inputs.media["image_grid_thw"],
        attention_mask=mask_BS,
    )
    rows = [positions_3BS[:, b, :n] for b, n in enumerate(inputs.lengths)]
    return torch.cat([text_S[None], torch.cat(rows, dim=1)])[:, None]


def check_packing(read: Reader, alone: Inputs, padded: Inputs, packed: Inputs, side: str) -> None:
    """Measure, on two rows, that packing keeps them apart. Raises UserError. Collective.

    `alone` is the second row, `padded` and `packed` both. What the second row's hidden states are
    off by is held against two other numbers: what the first row does to them in the same sequence
    without a boundary, and what padding does to them, which is rounding.
    """
    assert packed.lengths is not None
    first, second = packed.lengths
    unbounded = dataclasses.replace(packed, lengths=None)
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
