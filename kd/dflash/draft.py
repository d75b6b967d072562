"""The draft: a small stack that proposes a block of tokens in one forward (block diffusion).

DFlash (arXiv:2602.06036). The draft has no embedding and no head: it uses those of its target, and
reads what the target saw as the hidden states of some of its layers ("taps"). Modules and
parameters bear the names that serving engines load.

Shape legend: B rows, S context positions, A blocks of a row, T tokens of a block, Q = A * T draft
positions, D hidden, M = taps * D, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from kd.parallel import DTYPES, ParallelConfig, World, offload_policy

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, H, Q, E], keys and values [B, G, S + Q, E] -> [B, H, Q, E]; it holds the mask."""
Rotary = tuple[Tensor, Tensor]


class ContextCache:
    """Keys and values of context positions, per layer; those of blocks are never kept."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, G, new, E] on the sequence; returns all there is."""
        held = self.layers[layer]
        if held is not None:
            key, value = torch.cat([held[0], key], 2), torch.cat([held[1], value], 2)
        self.layers[layer] = key, value
        return key, value


class DraftAttention(nn.Module):
    """Queries from the block; keys and values from the context and the block, by one projection."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        groups = config.num_key_value_heads
        assert head is not None and groups is not None
        self.head_dim = head
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, groups * head, bias=False)
        self.v_proj = nn.Linear(width, groups * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)
        self.q_norm = Qwen3RMSNorm(head, config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(head, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _keys_values(self, x_BSD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        key = self.k_norm(self._heads(self.k_proj(x_BSD))).transpose(1, 2)
        _, key = apply_rotary_pos_emb(key, key, *rotary)
        return key, self._heads(self.v_proj(x_BSD)).transpose(1, 2)

    def forward(
        self,
        x_BQD: Tensor,
        context_BSD: Tensor,
        rotary: Rotary,
        context_rotary: Rotary,
        attend: Attend,
        extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """[B, Q, D]. `extend` turns keys and values of new context into those of all of it."""
        query = self.q_norm(self._heads(self.q_proj(x_BQD))).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *rotary)
        key, value = self._keys_values(x_BQD, rotary)
        context_key, context_value = extend(*self._keys_values(context_BSD, context_rotary))
        key, value = torch.cat([context_key, key], 2), torch.cat([context_value, value], 2)
        out_BHQE = attend(query, key, value)
        return self.o_proj(out_BHQE.transpose(1, 2).flatten(2))


class DraftLayer(nn.Module):
    """A pre-norm block. The context skips its input norm: it has had the `hidden_norm`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BQD: Tensor, *context: Any) -> Tensor:
        """See `DraftAttention.forward`."""
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), *context)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class Draft(nn.Module):
    """The draft. `config` is a Qwen3Config with `block_size` and `dflash_config` (see `export`)."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.target_layer_ids: list[int] = config.dflash_config["target_layer_ids"]
        self.mask_token_id: int = config.dflash_config["mask_token_id"]
        self.block_size: int = config.block_size
        width = config.hidden_size
        self.fc = nn.Linear(len(self.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width, config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Draft:
        """Moves and casts, except that the rotary frequencies stay in float32."""
        exact = self.rotary_emb.inv_freq
        super()._apply(fn, recurse)
        self.rotary_emb.inv_freq = exact.to(self.rotary_emb.inv_freq.device)
        return self

    def init_weights(self, seed: int) -> None:
        """Matrices from N(0, initializer_range), norms 1; the same whatever was drawn before."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=self.config.initializer_range)
                else:
                    parameter.fill_(1.0)

    def distribute(
        self, world: World, config: ParallelConfig, *, cpu_offload: bool = False
    ) -> None:
        """Move to the device and shard. Every rank holds the same weights before."""
        policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[config.compute_dtype],
            reduce_dtype=DTYPES[config.reduce_dtype],
            cast_forward_inputs=False,
        )
        self.to(world.device)
        offload = offload_policy(world, cpu_offload)
        for module in [*self.layers, self]:
            fully_shard(module, mesh=world.mesh, mp_policy=policy, offload_policy=offload)

    def forward(
        self,
        taps_BSM: Tensor,
        embeds_BQD: Tensor,
        context_positions_BS: Tensor,
        positions_BQ: Tensor,
        attend: Attend,
        cache: ContextCache | None = None,
    ) -> Tensor:
        """Hidden states [B, Q, D] of the draft positions, ready for the target's head.

        Args:
            taps_BSM: the target's hidden states of the tapped layers, one after another, of the
                context that is new (all of it without a cache).
            embeds_BQD: the target's embeddings of the blocks: an anchor token, then MASK.
            context_positions_BS: of the new context, counted in tokens (images' included).
            positions_BQ: of the draft positions: the anchor's and those after it.
            attend: attention with its mask over the context of the cache, the new one, the blocks.
            cache: keys and values of earlier context, which it is extended by.
        """
        context_BSD = self.hidden_norm(self.fc(taps_BSM.to(self.fc.weight.dtype)))
        x_BQD = embeds_BQD.to(context_BSD.dtype)
        rotary = self.rotary_emb(x_BQD, positions_BQ)
        context_rotary = self.rotary_emb(x_BQD, context_positions_BS)
        for i, layer in enumerate(self.layers):
            x_BQD = layer(x_BQD, context_BSD, rotary, context_rotary, attend, _extender(cache, i))
        return self.norm(x_BQD)


def _extender(
    cache: ContextCache | None, layer: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if cache is None:
        return lambda key, value: (key, value)
    return lambda key, value: cache.extend(layer, key, value)
