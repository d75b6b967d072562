"""Positions of a batch's tokens as a model's forward computes them, without its weights.

Models with M-RoPE (Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1) look through every row
for its images, which on a GPU takes several host syncs per row. Here it is done where batches are
collated, on the CPU.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from kd.types import Inputs

FindPositions = Callable[[Inputs], Tensor | None]
"""`position_ids` of a batch, for a certain model."""

FINDER = "compute_3d_position_ids"
"""What the forward of a model with M-RoPE calls where it is given no positions."""


class Positions:
    """`position_ids` for the forward of `model`; holds no weights, and can be pickled."""

    def __init__(self, model: PreTrainedModel) -> None:
        base = model.base_model
        self._finder = _without_weights(base) if hasattr(base, FINDER) else None
        """None: the forward of this model counts from 0 in every row, without a host sync."""

    def __call__(self, inputs: Inputs) -> Tensor | None:
        """[3, B, S] of padded rows, where one has an image; None: the forward counts from 0.

        Of packed rows [1, S], or [4, 1, S] where one has an image. They begin anew in each row,
        which is where transformers bounds the attention if there is no mask. The first of the four
        is that of the text, which only bounds; the others are time, height and width.
        """
        ids_BS, mask_BS, lengths = inputs.input_ids_BS, inputs.attention_mask_BS, inputs.lengths
        if lengths is None:
            return self._find(ids_BS, mask_BS, inputs.media)
        text_S = torch.cat([torch.arange(n, device=ids_BS.device) for n in lengths])
        media = dict(inputs.media)
        for name in {"mm_token_type_ids"} & media.keys():  # one per token
            media[name] = _padded(media[name], lengths)
        found_3BS = self._find(_padded(ids_BS, lengths), _padded(mask_BS, lengths), media)
        if found_3BS is None:
            return text_S[None]
        rows = [found_3BS[:, b, :n] for b, n in enumerate(lengths)]
        return torch.cat([text_S[None], torch.cat(rows, dim=1)])[:, None]

    def _find(self, ids_BS: Tensor, mask_BS: Tensor, media: dict[str, Tensor]) -> Tensor | None:
        if self._finder is None:
            return None
        find = getattr(self._finder, FINDER)
        known = {"input_ids": ids_BS, "attention_mask": mask_BS, **media}
        return find(**{name: known.get(name) for name in inspect.signature(find).parameters})


def left_to_the_forward(inputs: Inputs) -> None:
    """None given: the model finds them itself, where it reads."""


def _padded(x_1S: Tensor, lengths: list[int]) -> Tensor:
    """Packed rows apart: [B, S of the longest]."""
    return pad_sequence(x_1S[0].split(lengths), batch_first=True)


def _without_weights(base: PreTrainedModel) -> nn.Module:
    """A module of its class that has its config and plain settings, and no parts."""
    bare = type(base).__new__(type(base))
    nn.Module.__init__(bare)
    for name, value in vars(base).items():
        if isinstance(value, (bool, int, float, str, PreTrainedConfig)):
            setattr(bare, name, value)
    bare.rope_deltas = None  # what it remembers of its last rows
    return bare
