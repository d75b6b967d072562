"""The `draft` options: its shape, its blocks, and how it is trained.

Null stands for what the target has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Qwen3Config

from kd.dflash.attention import KINDS
from kd.dflash.export import draft_config
from kd.dflash.loss import Weighting
from kd.dflash.target import check_layers, default_layer_ids
from kd.model import PretrainedModel
from kd.types import UserError


@dataclass
class DraftConfig:
    """A DFlash draft (arXiv:2602.06036)."""

    block_size: int = 16
    """Tokens of a block: the anchor, and those proposed after it."""
    num_anchors: int | None = 512
    """Blocks per row and step, drawn anew every step; null: at every token of the response."""
    num_layers: int = 5
    num_taps: int = 5
    """Layers of the target that the draft reads, spread over its depth."""
    target_layer_ids: list[int] | None = None
    """Which, from 0, in place of `num_taps`."""
    hidden_size: int | None = None
    """Can only be the target's, whose embedding and head the draft uses."""
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    mask_token_id: int | None = None
    """The vocabulary slot that stands for MASK, one that no text holds."""
    mask_token: str | None = None
    """The same as a token. Null, both: one that the tokenizer calls its mask, else an entry of the
    target's embedding that no token has."""
    embed_key: str | None = None
    """The target's embedding by name, where it is not found by itself."""
    lm_head_key: str | None = None
    """The target's head by name."""
    weighting: Weighting = field(default_factory=Weighting)
    attention: str = "auto"
    """dense (a mask), flex (FlexAttention), or auto: flex on a GPU."""
    seed: int = 0
    """Of its first weights."""
    export_dtype: str = "bfloat16"
    """In which the exported weights are written."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if type(self.weighting) is Weighting:
            raise UserError("no weighting is chosen: give draft/weighting=decay or dpace")
        self.weighting.validate(f"{key}.weighting")
        if self.block_size < 2:
            raise UserError(
                f"{key}.block_size={self.block_size}: at least 2, an anchor and a token"
            )
        for name in ("num_layers", "num_taps", "num_anchors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{key}.{name}={value}: must be at least 1")
        if self.attention not in KINDS:
            raise UserError(f"{key}.attention={self.attention}: use {', '.join(KINDS)}")
        if self.mask_token is not None and self.mask_token_id is not None:
            raise UserError(f"{key}.mask_token and {key}.mask_token_id: give one of them")
        if self.export_dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"{key}.export_dtype={self.export_dtype}: float32, bfloat16 or float16")

    def resolve(self, target: PreTrainedConfig, vocab_size: int, mask_token_id: int) -> Qwen3Config:
        """The draft's architecture beside this target.

        Raises UserError where it does not fit, or the target does not say what is null here.
        """
        text = target.get_text_config(decoder=True)
        width = text.hidden_size
        if self.hidden_size not in (None, width):
            raise UserError(
                f"draft.hidden_size={self.hidden_size}: the target is {width} wide, and the draft "
                "uses its embedding and head: leave it null"
            )
        layer_ids = self.target_layer_ids
        if layer_ids is None:
            layer_ids = default_layer_ids(text.num_hidden_layers, self.num_taps)
            if len(set(layer_ids)) < self.num_taps or layer_ids[0] < 0:
                raise UserError(
                    f"draft.num_taps={self.num_taps}: too many for a target of "
                    f"{text.num_hidden_layers} layers; lower it, or name draft.target_layer_ids"
                )
        check_layers(layer_ids, text.num_hidden_layers)
        values = text.to_dict()
        heads = self._or(values, "num_attention_heads")
        return draft_config(
            target_layers=text.num_hidden_layers,
            vocab_size=vocab_size,
            layer_ids=layer_ids,
            mask_token_id=mask_token_id,
            block_size=self.block_size,
            rope_theta=self.rope_theta or _rope_theta(values),
            max_positions=text.max_position_embeddings,
            hidden_size=width,
            intermediate_size=self._or(values, "intermediate_size"),
            num_layers=self.num_layers,
            num_heads=heads,
            num_kv_heads=self._or(values, "num_key_value_heads"),
            head_dim=self.head_dim or values.get("head_dim") or width // heads,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        )

    def _or(self, target: dict[str, Any], name: str) -> int:
        value = getattr(self, name) or target.get(name)
        if value is None:
            raise UserError(f"draft.{name} has no value, and the target has none: give one")
        return value

    def find_mask_token(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
        """The vocabulary slot of MASK. Raises UserError where none is named or found."""
        if self.mask_token is not None:
            found = tokenizer.get_vocab().get(self.mask_token)
            if found is None:
                raise UserError(
                    f"draft.mask_token={self.mask_token}: the tokenizer has no such token"
                )
        else:
            found = self.mask_token_id
        if found is None and tokenizer.mask_token is not None:
            found = tokenizer.get_vocab()[tokenizer.mask_token]
        if found is None and len(tokenizer) < vocab_size:
            found = len(tokenizer)
        if found is None:
            raise UserError(
                "no token that could stand for MASK: the tokenizer names none and fills the whole "
                "vocabulary; name one that no text holds by draft.mask_token or draft.mask_token_id"
            )
        if not 0 <= found < vocab_size:
            raise UserError(
                f"draft.mask_token_id={found}: the target has {vocab_size} vocabulary entries"
            )
        if found in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            raise UserError(
                f"the MASK token {found} is the tokenizer's end or padding token: name another by "
                "draft.mask_token or draft.mask_token_id"
            )
        return found


def _rope_theta(text: dict[str, Any]) -> float:
    rope = text.get("rope_parameters") or {}
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise UserError("draft.rope_theta has no value, and the target has none: give one")
    return float(theta)


@dataclass
class TargetConfig(PretrainedModel):
    """The frozen model that is to decode faster, sharded over the ranks."""

    dtype: str = "bfloat16"
    cpu_offload: bool = False
    """Keep the sharded weights in host memory and copy each block to the device when it runs."""
    states_folder: str | None = None
    """Keep there what the draft reads of every row, and have the target read no row twice."""
