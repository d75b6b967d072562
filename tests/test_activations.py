"""The estimate of what blocks keep for the backward, against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from kd.activations import kept_bytes, kept_in_torch, kept_per_token
from kd.model import ProcessorConfig
from kd.model.parts import find_part
from kd.parallel import blocks
from kd.vision_activations import Tower, patches_of_row

TOKENS = 256
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
}


def config(name: str, vision: dict[str, Any], **text: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(name, text_config={**TEXT, **text}, vision_config=vision)


FAMILIES = {
    "plain": lambda: config("idefics3", VISION, model_type="llama"),
    "normed heads": lambda: config("qwen3_vl", QWEN_VISION, rope_parameters=ROPE),
    "experts, then dense": lambda: config(
        "qwen3_vl_moe", QWEN_VISION, rope_parameters=ROPE, mlp_only_layers=[1], **EXPERTS
    ),
    "convolution, then attention": lambda: config(
        "lfm2_vl",
        {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16},
        **{"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        block_auto_adjust_ff_dim=False,
    ),
    "four norms": lambda: config("gemma3", VISION, layer_types=["full_attention"] * 2),
    "gated attention": lambda: config("qwen3_5", QWEN_VISION, **LINEAR),
    "gated attention, shared expert": lambda: config(
        "qwen3_5_moe", QWEN_VISION, **LINEAR, **EXPERTS, shared_expert_intermediate_size=32
    ),
}


def kept_by_autograd(model: PreTrainedModel, dtype: torch.dtype) -> list[float]:
    """Bytes per token of the storages that each block is the first to keep."""
    layers, held = blocks(model.get_decoder()), []
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = [0.0] * (len(layers) + 1)  # the last: before and after the blocks
    running = [len(layers)]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(x)  # or its address would be used again
            kept[running[0]] += storage.nbytes() / TOKENS
        return x

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: running.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: running.__setitem__(0, len(layers)))
    embeds = torch.randn(1, TOKENS, TEXT["hidden_size"], dtype=dtype, requires_grad=True)
    with saved_tensors_hooks(pack, lambda x: x):
        model.get_decoder()(inputs_embeds=embeds, use_cache=False)
    return kept[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_estimate_is_near_what_autograd_keeps(family, dtype):
    model = AutoModelForImageTextToText.from_config(FAMILIES[family](), dtype=dtype).train()
    kept = kept_by_autograd(model, dtype)
    types = getattr(model.config.get_text_config(), "layer_types", ["full_attention"] * 2)
    for layer, found, kind in zip(blocks(model.get_decoder()), kept, types, strict=True):
        estimate = kept_per_token(layer, EXPERTS["num_experts_per_tok"], dtype.itemsize)
        estimate += kept_in_torch(layer)
        assert (kept_in_torch(layer) > 0) == (kind == "linear_attention")
        # Gemma's norms keep more, in float32.
        assert estimate == pytest.approx(found, rel=0.15 if family == "four norms" else 0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_delta_rule_in_torch(dtype):
    """With more heads and other widths."""
    shapes = {"linear_num_key_heads": 8, "linear_num_value_heads": 16}
    shapes |= {"linear_key_head_dim": 64, "linear_value_head_dim": 32}
    made = config("qwen3_5", QWEN_VISION, **{**LINEAR, **shapes})
    model = AutoModelForImageTextToText.from_config(made, dtype=dtype).train()
    layer = blocks(model.get_decoder())[0]
    found = kept_by_autograd(model, dtype)[0]
    estimate = kept_per_token(layer, 1, dtype.itemsize) + kept_in_torch(layer)
    assert estimate == pytest.approx(found, rel=0.1)
    assert kept_in_torch(layer) > 0.5 * found


def test_gated_delta_rule_of_qwen3_5_4b():
    """As measured for 32 heads of 128: 0.49 GiB of a row of 2,048 tokens."""
    shapes = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    shapes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    with torch.device("meta"):
        made = config("qwen3_5", QWEN_VISION, **{**LINEAR, **shapes})
        layer = blocks(AutoModelForImageTextToText.from_config(made).get_decoder())[0]
    assert 2048 * kept_in_torch(layer) / 2**30 == pytest.approx(0.49, abs=0.005)
    assert 8192 * kept_in_torch(layer) / 2**30 == pytest.approx(1.94, abs=0.01)


def kept_by_tower(model: PreTrainedModel, inputs: dict[str, Tensor], patches: int) -> list[float]:
    """Bytes per patch of the storages that each block of the vision tower is the first to keep."""
    tower = model.get_encoder(modality="image")
    layers, held = blocks(tower), []
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, running = [0.0] * (len(layers) + 1), [len(layers)]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(x)
            kept[running[0]] += storage.nbytes() / patches
        return x

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: running.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: running.__setitem__(0, len(layers)))
    with saved_tensors_hooks(pack, lambda x: x):
        tower(**inputs)
    return kept[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_trained_tower_is_near_what_autograd_keeps(family, dtype):
    """256 patches; the last block, as the first also keeps the tables of positions."""
    wide, patches = {"hidden_size": 32, "intermediate_size": 128}, 256
    if family == "qwen3_vl":
        vision = {**QWEN_VISION, **wide, "depth": 2}
        made = config(family, vision, rope_parameters=ROPE)
        inputs = {"grid_thw": torch.tensor([[1, 16, 16]])}
        inputs["hidden_states"] = torch.randn(patches, 3 * 2 * 16 * 16, dtype=dtype)
    else:
        vision = {**VISION, **wide, "num_hidden_layers": 2, "image_size": 224, "patch_size": 14}
        made = config(family, vision, layer_types=["full_attention"] * 2)
        inputs = {"pixel_values": torch.randn(1, 3, 224, 224, dtype=dtype)}
    model = AutoModelForImageTextToText.from_config(made, dtype=dtype).train()
    assert patches_of_row(model, ProcessorConfig(max_pixels=256 * 256), 1000) == patches
    tower, found = Tower(model, dtype.itemsize), kept_by_tower(model, inputs, patches)
    assert tower.kept_per_patch(checkpointing=False) == pytest.approx(2 * found[-1], rel=0.08)
    inputs_of_blocks = 2 * 32 * dtype.itemsize
    assert tower.kept_per_patch(checkpointing=True) == pytest.approx(
        inputs_of_blocks + found[-1], rel=0.08
    )
    for name in find_part(model, "vision_tower", "student.freeze"):
        name.requires_grad_(False)
    assert tower.kept_per_patch(checkpointing=False) == 0
    tower.layers[1].requires_grad_(True)
    assert tower.kept_per_patch(checkpointing=False) == pytest.approx(found[-1], rel=0.08)


def test_linear_attention_by_hand():
    """What is kept with the fused kernels."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(FAMILIES["gated attention"]())
    layer = blocks(model.get_decoder())[0]
    keys, values, hidden, inner = 2 * 16, 4 * 32, 64, 192
    convolved = 2 * keys + values
    mixer = 2 * convolved + 3 * values  # around the convolution; z, output and gated output
    mixer += 2 * 4 + 2 * 4 * 16  # decay and strength, queries and keys for all heads
    mixer += 4 * values  # the gated norm, in torch: input, normalised, gate activated, product
    norms_and_mlp = 2 * 3 * hidden + 4 * inner
    assert kept_per_token(layer, 1, 4) == pytest.approx(4 * (mixer + norms_and_mlp), rel=0.15)


def test_checkpointing_keeps_inputs_and_one_block():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(FAMILIES["experts, then dense"]())
    sparse, dense = (kept_per_token(layer, 2, 2) for layer in blocks(model.get_decoder()))
    assert kept_bytes(model, 10, 2, checkpointing=False) == 10 * (sparse + dense)
    inputs = 2 * TEXT["hidden_size"] * 2
    assert kept_bytes(model, 10, 2, checkpointing=True) == 10 * (inputs + max(sparse, dense))


def test_experts_that_a_token_does_not_see_cost_nothing_but_their_routing():
    def kept(experts: int, seen: int) -> int:
        made = config(
            "qwen3_vl_moe",
            QWEN_VISION,
            rope_parameters=ROPE,
            **{**EXPERTS, "num_experts": experts, "num_experts_per_tok": seen},
        )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(made)
        return kept_bytes(model, 1, 2, checkpointing=False)

    assert kept(64, 2) - kept(8, 2) == 2 * 2 * 56
    # An expert's input and output, and four times its width, in both layers.
    assert kept(8, 3) - kept(8, 2) == 2 * 2 * (2 * 64 + 4 * 48)
