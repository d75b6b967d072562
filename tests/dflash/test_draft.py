"""The draft against a plain re-statement, its taps, its export."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu, softmax

from kd.dflash import ContextCache, Draft, Target, default_layer_ids, export_draft, load_draft
from kd.dflash.attention import attention
from kd.parallel import ParallelConfig, World
from kd.types import UserError
from tests.dflash.conftest import LAYERS, TAPS, Pair, build, sample
from tests.precision import assert_same_rows


def norm(x, weight):
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x, positions, theta):
    """x [B, heads, L, E], positions [B, L]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions[:, None, :, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def plain(draft: Draft, taps, embeds, context_positions, positions, seen) -> torch.Tensor:
    """One head at a time, in float64, with -inf for what is not seen."""
    w = {name: p.detach().double() for name, p in draft.named_parameters()}
    config = draft.config
    theta, size = config.rope_parameters["rope_theta"], config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    context, x = norm(taps.double() @ w["fc.weight"].T, w["hidden_norm.weight"]), embeds.double()
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}."

        def heads(y, name, at=at):
            out = y @ w[f"{at}self_attn.{name}_proj.weight"].T
            return out.unflatten(-1, (-1, size)).transpose(1, 2)

        h = norm(x, w[f"{at}input_layernorm.weight"])
        q = rotate(norm(heads(h, "q"), w[f"{at}self_attn.q_norm.weight"]), positions, theta)
        both, where = torch.cat([context, h], 1), torch.cat([context_positions, positions], 1)
        k = rotate(norm(heads(both, "k"), w[f"{at}self_attn.k_norm.weight"]), where, theta)
        v = heads(both, "v")
        out = []
        for head in range(config.num_attention_heads):
            scores = q[:, head] @ k[:, head // groups].transpose(1, 2) / size**0.5
            scores = scores.masked_fill(~seen[:, 0], -torch.inf)
            out.append(softmax(scores, -1) @ v[:, head // groups])
        x = x + torch.cat(out, -1) @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up, down = (w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (silu(h @ gate) * (h @ up)) @ down
    return norm(x, w["norm.weight"])


@pytest.fixture(scope="module")
def inputs(full: Pair):
    """A batch of three rows as the draft reads it."""
    batch = full.collator(full.greedy([sample(i) for i in range(3)]))
    draft = full.draft()
    with torch.no_grad():
        for parameter in draft.parameters():  # norms begin at 1, which would hide them
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    blocks = full.maker(draft, 5)(batch)
    states = full.target.states(batch.student, blocks.ids_BQ)
    length = batch.student.input_ids_BS.shape[1]
    context = torch.arange(length).expand(3, -1)
    return draft, states, context, blocks


def test_against_a_plain_restatement(inputs):
    draft, states, context, blocks = inputs
    attend = attention("dense", blocks.anchors_BA, blocks.valid_BA, context.shape[1], 4)
    args = states.taps_BSM, states.embeds_BQD, context, blocks.positions_BQ
    found = draft(*args, attend)
    wanted = plain(draft, *args, attend.seen_B1QK)
    assert_same_rows(found.double(), wanted, draft)


def test_a_context_read_piece_by_piece(inputs):
    draft, states, context, blocks = inputs
    length = context.shape[1]
    attend = attention("dense", blocks.anchors_BA, blocks.valid_BA, length, 4)
    whole = draft(states.taps_BSM, states.embeds_BQD, context, blocks.positions_BQ, attend)
    cache = ContextCache(len(draft.layers))
    for start, end in ((0, 7), (7, 8), (8, length)):
        seen = attention("dense", blocks.anchors_BA, blocks.valid_BA, end, 4)
        last = draft(
            states.taps_BSM[:, start:end],
            states.embeds_BQD,
            context[:, start:end],
            blocks.positions_BQ,
            seen,
            cache,
        )
    assert_same_rows(last, whole, draft)


def test_frequencies_stay_in_float32(full):
    draft = full.draft().to(torch.bfloat16)
    assert draft.fc.weight.dtype == torch.bfloat16
    exact = full.draft().rotary_emb.inv_freq
    assert exact.dtype == torch.float32
    assert torch.equal(draft.rotary_emb.inv_freq, exact)


# ---- taps ----------------------------------------------------------------------------------------


def test_taps_are_what_the_next_layer_reads_and_nothing_else_is_kept(pair):
    batch = pair.collator(pair.greedy([sample(i) for i in range(3)]))
    layers = pair.target.model.get_decoder().layers
    read = {}
    handles = [
        layers[i + 1].register_forward_pre_hook(
            lambda _, args, kwargs, i=i: read.update({i: (args or [kwargs["hidden_states"]])[0]}),
            with_kwargs=True,
        )
        for i in TAPS
    ]
    blocks = pair.maker(pair.draft())(batch)
    states = pair.target.states(batch.student, blocks.ids_BQ)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(states.taps_BSM, torch.cat([read[i] for i in TAPS], -1))
    assert not any(layer._forward_pre_hooks for layer in layers)
    embedding = pair.target.model.get_input_embeddings()
    torch.testing.assert_close(states.embeds_BQD, embedding(blocks.ids_BQ))
    assert states.weight_VD is pair.target.model.get_output_embeddings().weight


def test_taps_of_qwen3_vl_have_the_image_features_added_after_a_layer():
    pair = build("qwen3_vl")
    batch = pair.collator(pair.greedy([sample(0)]))
    taps = pair.target.states(batch.student, torch.zeros(1, 1, dtype=torch.int64)).taps_BSM
    outputs = {}
    layer = pair.target.model.get_decoder().layers[0]
    handle = layer.register_forward_hook(lambda _, args, out: outputs.update(first=out))
    pair.target.states(batch.student, torch.zeros(1, 1, dtype=torch.int64))
    handle.remove()
    width = pair.target.width
    image = batch.student.input_ids_BS == pair.target.model.config.image_token_id
    differs = (taps[..., :width] != outputs["first"]).any(-1)
    assert differs[image].all() and not differs[~image].any()


@pytest.mark.parametrize(
    ("layers", "ids"),
    [
        (24, [1, 6, 11, 16, 21]),
        (32, [1, 8, 15, 22, 29]),
        (36, [1, 9, 17, 25, 33]),
        (64, [1, 16, 31, 46, 61]),
    ],
)
def test_the_published_taps(layers, ids):
    assert default_layer_ids(layers, 5) == ids
    assert default_layer_ids(layers, 1) == [layers // 2]


@pytest.mark.parametrize("ids", [[0, LAYERS - 1], [-1, 2], [2, 0], [1, 1], []])
def test_taps_that_cannot_be(full, ids):
    with pytest.raises(UserError, match=r"draft\.target_layer_ids"):
        Target(full.target.model, ids)


def test_embedding_and_head_by_name(full):
    model = full.target.model
    names = {id(m): name for name, m in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())]
    # The head is tied, so that the one can stand for the other.
    named = Target(model, TAPS, f"{embedding}.weight", f"{embedding}.weight")
    ids = torch.tensor([[3, 4]])
    torch.testing.assert_close(named.embed(ids), full.target.embed(ids))
    hidden = torch.randn(1, 2, full.target.width)
    torch.testing.assert_close(named.logits(hidden), full.target.logits(hidden))
    head = Target(model, TAPS, "lm_head.weight", "lm_head.weight")
    torch.testing.assert_close(head.embed(ids), full.target.embed(ids))
    with pytest.raises(UserError, match=r"draft\.embed_key=no\.such"):
        Target(model, TAPS, "no.such.weight")
    visual = next(n for n, m in model.named_modules() if "visual" in n and hasattr(m, "weight"))
    with pytest.raises(UserError, match=r"draft\.lm_head_key=.*of shape"):
        Target(model, TAPS, None, visual)


# ---- its shape -----------------------------------------------------------------------------------


def test_what_does_not_fit_the_target_is_refused(full):
    words, vocab = full.processor.tokenizer, full.target.vocab_size
    config = full.target.model.config

    def made(**changes):
        changed = dataclasses.replace(full.config, **changes)
        changed.validate("draft")
        return changed.resolve(config, vocab, changed.find_mask_token(words, vocab))

    assert made(hidden_size=32).hidden_size == 32
    for changes, says in [
        ({"hidden_size": 64}, "the target is 32 wide"),
        ({"target_layer_ids": None, "num_taps": 5}, "too many for a target of 4 layers"),
        ({"mask_token": None}, "no token that could stand for MASK"),
        ({"mask_token": "<nothing>"}, "no such token"),
        ({"mask_token": None, "mask_token_id": vocab}, f"the target has {vocab}"),
        ({"mask_token": None, "mask_token_id": words.eos_token_id}, "end or padding token"),
        ({"mask_token_id": 5}, "give one of them"),
        ({"block_size": 1}, "at least 2"),
        ({"num_anchors": 0}, "at least 1"),
        ({"attention": "sparse"}, "dense, flex"),
    ]:
        with pytest.raises(UserError, match=says):
            made(**changes)
    # A head padded beyond the tokenizer has a slot that no text holds.
    padded = dataclasses.replace(full.config, mask_token=None)
    assert padded.find_mask_token(words, vocab + 3) == len(words)


# ---- export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    made = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield made
    made.close()


def test_export_has_the_keys_that_engines_load_and_nothing_else(full, world: World, tmp_path):
    draft = full.draft(seed=7)
    export_draft(tmp_path / "export", draft, "float32", world)
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    weights = load_file(tmp_path / "export" / "model.safetensors")
    layer = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    layer += ["self_attn.q_norm", "self_attn.k_norm"]
    layer += ["input_layernorm", "post_attention_layernorm"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = ["fc", "hidden_norm", "norm", *(f"layers.{i}.{n}" for i in (0, 1) for n in layer)]
    assert set(weights) == {f"{name}.weight" for name in names}
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    mask = full.processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    wanted = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_target_layers": LAYERS,
        "block_size": 4,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": TAPS, "block_size": 4},
        "layer_types": ["full_attention"] * 2,
        "sliding_window": None,
        "is_causal": False,
        "vocab_size": full.target.vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "rope_theta": 1e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "dtype": "float32",
    }
    assert {key: config.get(key, "absent") for key in wanted} == wanted
    assert "auto_map" not in config


def test_an_export_read_back_drafts_the_same(full, world: World, tmp_path, inputs):
    draft, states, context, blocks = inputs
    export_draft(tmp_path / "export", draft, "float32", world)
    again = load_draft(tmp_path / "export")
    attend = attention("dense", blocks.anchors_BA, blocks.valid_BA, context.shape[1], 4)
    args = states.taps_BSM, states.embeds_BQD, context, blocks.positions_BQ, attend
    assert torch.equal(again(*args), draft(*args))


@pytest.mark.parametrize("change", ["missing", "renamed", "cut", "other"])
def test_a_folder_that_is_no_draft_is_refused(full, world: World, tmp_path, change):
    folder = tmp_path / "export"
    export_draft(folder, full.draft(), "float32", world)
    path, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "other":
        config.write_text(config.read_text().replace("DFlashDraftModel", "Qwen3ForCausalLM"))
    else:
        moved = weights.pop("fc.weight")
        save_file({**weights, **({"model.fc.weight": moved} if change == "renamed" else {})}, path)
    with pytest.raises(UserError, match=str(folder)):
        load_draft(folder)
