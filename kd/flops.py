"""Floating-point operations of a step, counted from the weights that its tokens meet.

Two for each number of a matrix and token, forward; as many for the gradient of what goes in, and
for that of the matrix. Attention: 2 · S² · width per layer, half of the scores being masked. Left
out: norms, activation functions, linear attention's states, and position embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from kd.activations import TOP_K
from kd.parallel import blocks


@dataclass(frozen=True)
class Row:
    """Of the data, on average."""

    tokens: int
    """Of prompt and response, those of images among them."""
    image_tokens: int
    response_tokens: int
    patches_per_token: int = 4
    """That the vision tower merges into one."""


@dataclass(frozen=True)
class Work:
    """Numbers of a model that a token is multiplied with."""

    text: int
    """In the blocks of the language model: of experts, those that a token sees."""
    trained_text: int
    vision: int
    """In the rest, by patch."""
    trained_vision: int
    attention_width: int
    """Heads times their size, over all layers with full attention."""
    head: int
    trained_head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        """Count those of a model as it is frozen, before it is sharded."""
        text = model.config.get_text_config(decoder=True)
        values = text.to_dict()
        top_k = next((values[name] for name in TOP_K if values.get(name)), None)
        in_text = [m for block in blocks(model.get_decoder()) for m in block.modules()]
        own = {id(m) for m in in_text}
        ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        others = [m for m in model.modules() if id(m) not in own | ends]
        kinds = values.get("layer_types") or ["full_attention"] * text.num_hidden_layers
        heads = text.num_attention_heads
        size = values.get("head_dim") or text.hidden_size // heads
        head = model.get_output_embeddings().weight
        return cls(
            *_numbers(in_text, top_k),
            *_numbers(others, None),
            heads * size * sum(kind != "linear_attention" for kind in kinds),
            head.numel(),
            head.numel() * head.requires_grad,
        )

    def forward(self, row: Row) -> float:
        """Of one row, with logits at its response."""
        text = 2 * self.text * row.tokens + 2 * self.attention_width * row.tokens**2
        vision = 2 * self.vision * row.image_tokens * row.patches_per_token
        return text + vision + 2 * self.head * row.response_tokens

    def training(self, row: Row, *, checkpointing: bool) -> float:
        """Of forward and backward of one row. Nothing is frozen before something trained."""
        text = 2 * self.text * row.tokens
        attention = 2 * self.attention_width * row.tokens**2
        backward = text + 2 * attention + 2 * self.trained_text * row.tokens
        head = 2 * (self.head + self.trained_head) * row.response_tokens
        if self.trained_vision:
            per_patch = 2 * (self.vision + self.trained_vision)
            backward += per_patch * row.image_tokens * row.patches_per_token
        again = text + attention if checkpointing else 0
        return self.forward(row) + backward + head + again


def _numbers(modules: list[nn.Module], top_k: int | None) -> tuple[int, int]:
    """(all, trained) numbers of these modules' own matrices."""
    found = trained = 0
    for module in modules:
        if isinstance(module, nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim < 2:
                continue
            size = weight.numel()
            if weight.ndim == 3 and top_k is not None:  # experts
                size = size // weight.shape[0] * top_k
            found += size
            trained += size * weight.requires_grad
    return found, trained
