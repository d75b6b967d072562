"""The frozen target as the draft sees it: hidden states of some layers, embeddings, head.

Shape legend: B rows, S sequence, Q draft positions, D hidden, M = taps * D, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.model import FrozenVLM
from kd.model.parts import find_part
from kd.types import Inputs, UserError


@dataclass
class TargetStates:
    """What the draft needs of one batch. The head stays whole until the target's next forward."""

    taps_BSM: Tensor
    embeds_BQD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


class Target(FrozenVLM):
    """A frozen VLM with taps. `embed_key`, `lm_head_key` name weights that are not found."""

    forward_methods = (*FrozenVLM.forward_methods, "states", "beside", "embed", "logits", "read")
    role = "target"

    def __init__(
        self,
        model: PreTrainedModel,
        layer_ids: list[int],
        embed_key: str | None = None,
        lm_head_key: str | None = None,
    ) -> None:
        super().__init__(model)
        self.layer_ids = layer_ids
        layers = find_part(model, "layers", "target")
        check_layers(layer_ids, len(layers))
        # A layer's output as the next one takes it in: some families add image features between
        # the two (Qwen3-VL's deepstack), and serving engines tap after that.
        self._tapped = [layers[i + 1] for i in layer_ids]
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        # In a tuple: as attributes they would be modules of this one a second time.
        self._ends = (
            _owner(model, embed_key, "draft.embed_key", embedding),
            _owner(model, lm_head_key, "draft.lm_head_key", head),
        )

    @property
    def width(self) -> int:
        """Of its hidden states."""
        return self._ends[1].get_parameter("weight").shape[1]

    @property
    def taps_width(self) -> int:
        """Of all taps of a token together."""
        return self.width * len(self.layer_ids)

    @property
    def vocab_size(self) -> int:
        """Entries of its head."""
        return self._ends[1].get_parameter("weight").shape[0]

    @torch.no_grad()
    def states(self, inputs: Inputs, block_ids_BQ: Tensor) -> TargetStates:
        """Taps of a batch, and the embeddings of the blocks. Only the tapped layers are kept."""
        with self.tapping() as taps:
            self.model.base_model(**inputs.model_inputs(), use_cache=False)
        return TargetStates(taps.joined(), self._embed(block_ids_BQ), *self._head_weights())

    @torch.no_grad()
    def beside(self, taps_BSM: Tensor, block_ids_BQ: Tensor) -> TargetStates:
        """Taps that are known, with the embeddings of the blocks and the head."""
        return TargetStates(taps_BSM, self._embed(block_ids_BQ), *self._head_weights())

    @torch.no_grad()
    def embed(self, ids_BQ: Tensor) -> Tensor:
        """The embeddings [B, Q, D] of tokens."""
        return self._embed(ids_BQ)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], the target's own or the draft's."""
        weight_VD, bias_V = self._head_weights()
        return nn.functional.linear(hidden.to(weight_VD.dtype), weight_VD, bias_V)

    @torch.no_grad()
    def read(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(last hidden states [B, S, D], taps [B, S, M]) of a forward with a cache."""
        with self.tapping() as taps:
            outputs = self.model.base_model(**inputs, use_cache=True)
        return outputs.last_hidden_state, taps.joined()

    def _embed(self, ids: Tensor) -> Tensor:
        embedding, _ = self._ends
        if isinstance(embedding, nn.Embedding):  # some scale what they look up
            return embedding(ids)
        return nn.functional.embedding(ids, embedding.get_parameter("weight"))

    def _head_weights(self) -> tuple[Tensor, Tensor | None]:
        _, head = self._ends
        bias_V = head.bias if isinstance(head, nn.Linear) else None
        return head.get_parameter("weight"), bias_V

    @contextlib.contextmanager
    def tapping(self) -> Iterator[Taps]:
        """Collect the tapped hidden states of the forwards inside."""
        taps = Taps(len(self._tapped))
        handles = [
            layer.register_forward_pre_hook(taps.hook(i), with_kwargs=True)
            for i, layer in enumerate(self._tapped)
        ]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()


class Taps:
    """What hooks have seen in the last forward."""

    def __init__(self, count: int) -> None:
        self.found: list[Tensor | None] = [None] * count

    def hook(self, i: int) -> Callable[[nn.Module, tuple, dict], None]:
        """Of the i-th tapped layer."""

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.found[i] = args[0] if args else kwargs["hidden_states"]

        return note

    def joined(self) -> Tensor:
        """[B, S, M], and forgets."""
        joined = torch.cat(self.found, -1)
        self.found = [None] * len(self.found)
        return joined


def default_layer_ids(num_layers: int, count: int) -> list[int]:
    """`count` layers spread over a target of `num_layers`; 0 is its first.

    round(1 + i ((L - 3) - 1) / (K - 1)), as DFlash picks them; the middle one for a single tap.
    """
    if count == 1:
        return [num_layers // 2]
    span = (num_layers - 3) - 1
    return [round(1 + i * span / (count - 1)) for i in range(count)]


def check_layers(layer_ids: list[int], num_layers: int) -> None:
    """Raise UserError for taps that are none of a target's layers, or are out of order."""
    last = num_layers - 2
    if not layer_ids or layer_ids != sorted(set(layer_ids)):
        raise UserError(f"draft.target_layer_ids={layer_ids}: give some, each once, in order")
    if layer_ids[0] < 0 or layer_ids[-1] > last:
        raise UserError(
            f"draft.target_layer_ids={layer_ids}: the target has {num_layers} layers, of which 0 "
            f"to {last} can be tapped"
        )


def _owner(model: PreTrainedModel, key: str | None, name: str, found: nn.Module) -> nn.Module:
    """The module of a weight."""
    if key is None:
        return found
    path = key.removesuffix(".weight")
    named = dict(model.named_modules())
    module = named.get(path)
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise UserError(f"{name}={key}: the target has no such weight")
    if module.weight.shape != found.weight.shape:
        raise UserError(
            f"{name}={key}: of shape {tuple(module.weight.shape)}, where "
            f"{tuple(found.weight.shape)} is wanted"
        )
    return module
