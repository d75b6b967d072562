"""A draft as a folder that vLLM (`{"method": "dflash"}`) and SGLang (`DFLASH`) load as it is.

Engines leave out weights whose names they do not know without a word: the key set is checked both
on writing and on reading.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Qwen3Config

from kd.dflash.draft import Draft
from kd.files import write_atomic
from kd.parallel import World
from kd.types import UserError

WEIGHTS = "model.safetensors"


def draft_keys(num_layers: int) -> set[str]:
    """The names of all weights that an exported draft has."""
    layer = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *("self_attn.q_norm", "self_attn.k_norm"),
        *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ]
    names = ["fc", "hidden_norm", "norm"]
    names += [f"layers.{i}.{name}" for i in range(num_layers) for name in layer]
    return {f"{name}.weight" for name in names}


def draft_config(
    *,
    target_layers: int,
    vocab_size: int,
    layer_ids: list[int],
    mask_token_id: int,
    block_size: int,
    rope_theta: float,
    max_positions: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rms_norm_eps: float,
) -> Qwen3Config:
    """The architecture of a draft, with all that engines look for in its config.json."""
    return Qwen3Config(
        architectures=["DFlashDraftModel"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=rms_norm_eps,
        max_position_embeddings=max_positions,
        # Both spellings: engines differ in which of them they read.
        rope_theta=rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        layer_types=["full_attention"] * num_layers,
        sliding_window=None,
        use_sliding_window=False,
        attention_bias=False,
        tie_word_embeddings=False,
        is_causal=False,
        num_target_layers=target_layers,
        block_size=block_size,
        dflash_config={
            "mask_token_id": mask_token_id,
            "target_layer_ids": layer_ids,
            "block_size": block_size,
        },
    )


def export_draft(folder: Path, draft: Draft, dtype: str, world: World) -> None:
    """Write config.json and model.safetensors. Collective; replaces what is there."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(draft, options=options)
    if not world.is_main:
        return
    weights = {name: _whole(value).to(getattr(torch, dtype)) for name, value in state.items()}
    assert set(weights) == draft_keys(len(draft.layers)), "engines load these names alone"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    config = {**draft.config.to_dict(), "dtype": dtype}
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    write_atomic(partial / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())
    shutil.copymode(partial / "config.json", partial / WEIGHTS)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _whole(value: Tensor) -> Tensor:
    return value.contiguous()


def load_draft(folder: str | Path) -> Draft:
    """An exported draft, in the dtype it was written in. Raises UserError for anything else."""
    folder = Path(folder)
    try:
        config = Qwen3Config(**json.loads((folder / "config.json").read_text()))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds no draft that can be read: {error}") from error
    if config.architectures != ["DFlashDraftModel"]:
        raise UserError(f"{folder} holds a {config.architectures}, not a DFlashDraftModel")
    if set(weights) != (wanted := draft_keys(config.num_hidden_layers)):
        odd = sorted(set(weights) ^ wanted)
        raise UserError(f"{folder}: weights that are missing or unknown: {', '.join(odd[:4])}")
    draft = Draft(config)
    draft.to(next(iter(weights.values())).dtype)
    draft.load_state_dict(weights)
    return draft.eval()
