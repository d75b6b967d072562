"""Every family of models through rendering, packing, loss, generation, sharding and export."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Florence2Config,
    GitConfig,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kd.data import Collator, Renderer
from kd.footprint import Whole
from kd.loss import ForwardKLConfig
from kd.model import (
    FrozenVLM,
    PretrainedModel,
    PretrainedStudent,
    ScratchModel,
    Student,
    check_packing,
    cut,
    export,
    same_rendering,
)
from kd.model.parts import parts
from kd.parallel import ParallelConfig, World, local, needs_fsdp
from kd.parallel.shard import blocks, groups
from kd.types import Batch, Inputs, Rollout, Sample, UserError
from tests.model.conftest import NONE, ONE, ROWS, TWO, UNREAD, Family, image
from tests.model.families import write
from tests.precision import assert_same_rows

shard = importlib.import_module("kd.parallel.shard")  # the package has a function of this name


def by_row(batch: Batch, x_ND: Tensor) -> list[Tensor]:
    return list(x_ND.split([len(rollout.response_ids) for rollout in batch.rollouts]))


def in_double(inputs: Inputs) -> Inputs:
    media = {k: x.double() if x.is_floating_point() else x for k, x in inputs.media.items()}
    return dataclasses.replace(inputs, media=media)


# ---- rendering and packing ---------------------------------------------------------------------


def test_a_row_is_the_same_alone_and_in_a_batch(family: Family):
    collate, vlm = family.collator(), FrozenVLM(family.model("float64"))
    batch = collate(ROWS)
    together = by_row(batch, vlm.targets(in_double(batch.student)).hidden_ND)
    for sample, hidden_ND in zip(ROWS, together, strict=True):
        alone_ND = vlm.targets(in_double(collate([sample]).student)).hidden_ND
        assert_same_rows(hidden_ND, alone_ND, vlm.model)  # norms compute in float32 all the same
    # Which image is seen matters far more than that.
    swapped = dataclasses.replace(TWO, images=[TWO.images[0], image(48, 64, 3)])
    other_ND = vlm.targets(in_double(collate([swapped]).student)).hidden_ND
    assert (other_ND - together[0]).abs().max() > 1e-2


MIXES_PACKED_ROWS = {
    "qwen3_5_hybrid": "a gated delta rule and a convolution that go on from row to row",
    "lfm2_vl": "a convolution that does",
    "gemma3": "attention in both directions within an image, bounded by the padding mask",
}


def test_packed_rows_do_not_see_each_other_or_are_refused(family: Family):
    collate, vlm = family.collator(), FrozenVLM(family.model("float64"))
    rows = collate.prepare(ROWS)
    packed = collate.batch(rows, packed=True)
    apart = by_row(packed, vlm.read(in_double(collate.batch(rows).student)))
    together = by_row(packed, vlm.read(in_double(packed.student)))
    off = max((a - b).abs().max().item() for a, b in zip(apart, together, strict=True))
    two = rows[:1] + rows[2:]
    batches = collate.batch(two[1:]), collate.batch(two), collate.batch(two, packed=True)
    check = functools.partial(
        check_packing,
        lambda inputs: vlm.read(in_double(inputs)),
        *(batch.student for batch in batches),
        "student",
    )
    if family.name in MIXES_PACKED_ROWS:
        assert off > 1e-2
        with pytest.raises(UserError, match="the student reads a row otherwise"):
            check()
    else:
        assert off < 1e-5  # the vision towers compute in float32 in part
        check()


def test_a_batch_is_what_the_processor_itself_makes(family: Family):
    rows, processor, vlm = [TWO, ONE], family.processor, FrozenVLM(family.model("float64"))
    batch = family.collator()(rows)
    texts = [
        processor.apply_chat_template(row.messages, add_generation_prompt=True, tokenize=False)
        + row.answer
        + processor.tokenizer.eos_token
        for row in rows
    ]
    own = dict(
        processor(
            text=texts,
            images=[row.images for row in rows],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    )
    ids_BS, mask_BS = own.pop("input_ids"), own.pop("attention_mask")
    assert torch.equal(ids_BS, batch.student.input_ids_BS)
    theirs = Inputs(ids_BS, mask_BS, batch.student.target_rows_N, own)
    ours_ND, theirs_ND = (vlm.targets(in_double(x)).hidden_ND for x in (batch.student, theirs))
    assert_same_rows(ours_ND, theirs_ND, vlm.model)


def test_patches_as_many_as_tokens_are_still_an_image(tmp_path: Path):
    write("lfm2_vl", tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    patches = 16
    for letters in range(patches):
        content = [{"type": "image"}, {"type": "text", "text": "qz" * 8}]
        content[1]["text"] = content[1]["text"][:letters]
        sample = Sample("a", [{"role": "user", "content": content}], ONE.images, None)
        prompt = Renderer(processor).prompt(sample)
        if len(prompt.ids_S) == patches:
            break
    assert prompt.media["pixel_attention_mask"].shape == (1, len(prompt.ids_S))
    assert not prompt.aligned_S


def test_renderings_that_differ_in_the_processors_own_numbers_differ(tmp_path: Path):
    write("mistral3", tmp_path)
    one, same, other = (AutoProcessor.from_pretrained(tmp_path) for _ in range(3))
    other.spatial_merge_size = 1
    assert same_rendering(one, same)
    assert not same_rendering(one, other)


# ---- loss --------------------------------------------------------------------------------------


def reference(model: PreTrainedModel, teacher: FrozenVLM, batch: Batch) -> Tensor:
    """Half CE, half forward KL, of whole logits."""
    z_NV, t_NV = (
        m(**batch.student.model_inputs()).logits.flatten(0, 1)[batch.student.target_rows_N]
        for m in (model, teacher.model)
    )
    kl_N = (t_NV.softmax(-1) * (t_NV.log_softmax(-1) - z_NV.log_softmax(-1))).sum(-1)
    return (cross_entropy(z_NV, batch.labels_N) + kl_N.mean()) / 2


def test_loss_and_gradients_are_those_of_whole_logits_and_a_step_lowers_it(family: Family):
    student = Student(family.model(), ForwardKLConfig().build(0.5))
    batch, teacher = family.collator()(ROWS), family.teacher()
    named = dict(student.model.named_parameters())

    expected = reference(student.model, teacher, batch)
    expected_grads = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    loss = student.distill(batch, teacher.targets(batch.teacher), batch.num_targets).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.detach())
    tower = parts(student.model)["vision_tower"][0]
    after = tuple(f"{tower}.{name}" for name in UNREAD.get(family.name, ()))
    unread = [name for name in named if name.startswith(after)]
    assert unread == [name for name, p in named.items() if p.grad is None]
    for (name, parameter), grad in zip(named.items(), expected_grads, strict=True):
        if name not in unread:
            assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-3)
    optimizer.step()
    again = student.distill(batch, teacher.targets(batch.teacher), batch.num_targets).loss
    assert again < loss


def test_checkpointed_activations_leave_loss_and_gradients_as_they_are(family: Family):
    batch = family.collator()(ROWS)
    losses, grads = [], []
    for checkpoint in (False, True):
        student = Student(family.model(), ForwardKLConfig().build(0.0))
        student.freeze(parts(student.model)["vision_tower"])
        if checkpoint:
            student.checkpoint_activations()
        losses.append(student.distill(batch, None, batch.num_targets).loss)
        losses[-1].backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    assert not any(".blocks." in name or ".encoder." in name for name in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_blank_image_leaves_the_loss_of_text_alone(family: Family):
    student = Student(family.model(), ForwardKLConfig().build(0.5))
    plain, filled = (family.collator(lockstep)([NONE, NONE]) for lockstep in (False, True))
    assert "pixel_values" not in plain.student.media
    assert "pixel_values" in filled.student.media
    losses = []
    for batch in (plain, filled):
        targets = family.teacher().targets(batch.teacher)
        losses.append(student.distill(batch, targets, batch.num_targets).loss)
    torch.testing.assert_close(*losses)
    losses[1].backward()
    tower = parts(student.model)["vision_tower"][0]
    weight = next(student.model.get_submodule(tower).parameters())
    assert weight.grad is not None and not weight.grad.any()


# ---- generating --------------------------------------------------------------------------------


def test_greedy_answers_are_the_same_alone_and_are_those_the_loss_sees(family: Family):
    collate, vlm = family.collator(), FrozenVLM(family.model())
    stop_ids = vlm.stop_ids(family.processor.tokenizer.eos_token_id)
    never = vlm.forbidden_ids(len(family.processor.tokenizer))
    together = cut(vlm.generate(collate.prompts(ROWS), 8, stop_ids, never), stop_ids)
    for sample, (ids, finished) in zip(ROWS, together, strict=True):
        alone = vlm.generate(collate.prompts([sample]), 8, stop_ids, never)
        assert cut(alone, stop_ids) == [(ids, finished)]
        batch = collate([Rollout(sample, ids, finished, 0)])
        targets = vlm.targets(batch.student)
        logits_NV = targets.hidden_ND @ targets.weight_VD.T
        logits_NV[:, never] = -torch.inf
        assert logits_NV.argmax(-1).tolist() == ids
    assert len({tuple(ids) for ids, _ in together}) > 1


def test_the_token_of_an_image_is_never_generated(family: Family):
    vlm, collate = FrozenVLM(family.model()), family.collator()
    prompts = collate.prompts([ONE, TWO])
    image_id = vlm.model.config.image_token_id
    assert (prompts.input_ids_BS == image_id).sum() >= 6
    # A head that wants nothing but it; its embedding is read nowhere, should the two be tied.
    last_ND = vlm.targets(dataclasses.replace(prompts, target_rows_N=torch.tensor([-1]))).hidden_ND
    vlm.model.get_output_embeddings().weight.data[image_id] = 10 * last_ND[0]
    assert vlm.model(**prompts.model_inputs()).logits[-1, -1].argmax() == image_id
    stop_ids, never = [family.processor.tokenizer.eos_token_id], vlm.forbidden_ids(10**6)
    assert image_id not in vlm.generate(prompts, 4, stop_ids, never)


# ---- sharding, parts and export ----------------------------------------------------------------


def test_parts_are_disjoint_and_leave_little(family: Family):
    model = family.model()
    found = parts(model)
    assert list(found) == ["vision_tower", "projector", "embeddings", "layers"]
    names = [name for part in found.values() for name in part]
    assert all(found.values())
    held = [set(model.get_submodule(name).parameters()) for name in names]
    assert all(held)
    assert sum(map(len, held)) == len(set.union(*held))
    assert [name.rsplit(".", 1)[1] for name in found["layers"]] == ["0", "1"]
    assert held[names.index(found["embeddings"][0])] == {model.get_input_embeddings().weight}
    rest = {name for name, p in model.named_parameters() if p not in set.union(*held)}
    assert {name.rsplit(".", 2)[-2] for name in rest} <= {
        "norm",  # of the decoder
        "embedding_norm",
        "lm_head",
        "model",  # LLaVA-OneVision's image_newline, a parameter of the whole
    }


def test_groups_of_sharding_are_the_blocks_of_both_towers(family: Family):
    model = family.model()
    found = parts(model)
    layers = [model.get_submodule(name) for name in found["layers"]]
    tower = [m for name in found["vision_tower"] for m in model.get_submodule(name).modules()]
    groups = blocks(model)
    assert len(layers) == len([group for group in groups if group in tower]) == 2
    assert set(layers) < set(groups)
    assert len(groups) == 4
    # A block is whole: attention and feed-forward are in it.
    in_blocks = sum(p.numel() for group in groups for p in group.parameters())
    towers = [model.get_encoder(modality="image"), model.get_decoder()]
    linear = [
        module
        for tower in towers
        for name, module in tower.named_modules()
        if isinstance(module, torch.nn.Linear) and "merger" not in name and "embedding" not in name
    ]
    assert in_blocks >= sum(module.weight.numel() for module in linear)


def test_sharded_it_has_the_same_loss_and_exports(family: Family, world: World, tmp_path: Path):
    batch, teacher = family.collator()(ROWS), family.teacher()
    targets = teacher.targets(batch.teacher)
    student = Student(family.model(), ForwardKLConfig().build(0.5))
    plain = student.distill(batch, targets, batch.num_targets).loss.detach()
    student.distribute(world, ParallelConfig(device="cpu"))
    loss = student.distill(batch, targets, batch.num_targets).loss
    torch.testing.assert_close(loss.detach(), plain)
    loss.backward()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    optimizer.step()

    spec = PretrainedStudent(name=str(family.folder), export_dtype="float32")
    export(tmp_path / "export", student, family.processor, spec, world)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    again = Collator(Renderer(processor), None, 2048, lockstep=False)(ROWS)
    stepped = student.distill(batch, targets, batch.num_targets).loss.detach()
    assert not torch.allclose(stepped, plain)
    other = Student(loaded, ForwardKLConfig().build(0.5))
    assert torch.equal(other.distill(again, targets, again.num_targets).loss.detach(), stepped)


def test_sharded_and_gathered_it_answers_the_same(family: Family, world: World):
    """Also after a forward: the hooks that some collect image features by must stay."""
    collate, vlm = family.collator(), FrozenVLM(family.model())
    arguments = collate.prompts(ROWS), 4, [family.processor.tokenizer.eos_token_id], []
    expected = vlm.generate(*arguments)
    vlm.distribute(world, ParallelConfig(device="cpu"))
    for _ in range(2):
        with vlm.gathered():
            assert torch.equal(vlm.generate(*arguments), expected)


@pytest.mark.parametrize(
    "names", [["vision_tower", "projector"], ["embeddings", "layers.0"], ["layers.0-1"]], ids=str
)
def test_frozen_parts_stay_and_the_rest_is_trained(family: Family, world: World, names: list[str]):
    student = Student(family.model(), ForwardKLConfig().build(0.0))
    student.freeze(names)
    found = parts(student.model)
    found |= {f"layers.{i}": [layer] for i, layer in enumerate(found["layers"])}
    found |= {"layers.0-1": found["layers"]}
    inside = tuple(f"model.{module}." for name in names for module in found[name])
    student.distribute(world, ParallelConfig(device="cpu"))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    batch = family.collator()(ROWS)
    student.distill(batch, None, batch.num_targets).loss.backward()
    torch.optim.AdamW([p for p in student.parameters() if p.grad is not None], lr=1e-2).step()

    after = dict(student.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    frozen = {name for name, p in after.items() if not p.requires_grad}
    assert frozen == {name for name in after if name.startswith(inside)}
    tower = found["vision_tower"][0]
    unread = tuple(f"model.{tower}.{name}" for name in UNREAD.get(family.name, ()))
    assert moved == {name for name in after if name not in frozen and not name.startswith(unread)}


def test_alone_in_one_precision_it_is_not_gathered_and_is_the_same(family: Family, world: World):
    """Every weight is held once: what FSDP2 gathers on one rank would be a copy."""
    batch, config = family.collator()(ROWS), ParallelConfig(device="cpu")
    sharded, placed = (Student(family.model(), ForwardKLConfig().build(0.0)) for _ in range(2))
    sharded.distribute(world, config)
    placed.place(world, config)
    assert not any(isinstance(module, FSDPModule) for module in placed.modules())
    losses = [s.distill(batch, None, batch.num_targets).loss for s in (sharded, placed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    both = dict(sharded.named_parameters()), dict(placed.named_parameters())
    assert both[0].keys() == both[1].keys()
    for name, p in both[0].items():
        other = both[1][name].grad
        assert (p.grad is None) == (other is None), name
        assert other is None or torch.equal(local(p.grad), other), name
    for dtype, cpu_offload in (("bfloat16", False), ("float32", True)):
        config = ParallelConfig(device="cpu", compute_dtype=dtype)
        assert needs_fsdp(placed.model, world, config, cpu_offload=cpu_offload)


def test_sharded_it_runs_in_bfloat16(family: Family, world: World):
    batch, teacher = family.collator()(ROWS), family.teacher()
    student = Student(family.model(), ForwardKLConfig().build(0.0))
    plain = student.distill(batch, None, batch.num_targets).loss.detach()
    student.distribute(world, ParallelConfig(device="cpu", compute_dtype="bfloat16"))
    teacher.distribute(world, ParallelConfig(device="cpu", compute_dtype="bfloat16"))
    loss = student.distill(batch, None, batch.num_targets).loss
    torch.testing.assert_close(loss.detach(), plain, atol=0.05, rtol=0.02)
    loss.backward()
    assert teacher.targets(batch.teacher).hidden_ND.isfinite().all()


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (Florence2Config(), "is an encoder-decoder"),
        (MllamaConfig(), "sees its images by cross-attention"),
        (GitConfig(), "has no token that stands for an image"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.model_type,
)
def test_models_that_read_images_otherwise_are_refused(
    config: PreTrainedConfig, problem: str, tmp_path: Path
):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=problem):
        PretrainedModel(name=str(tmp_path)).dry_config()


def test_scratch_is_for_one_processor(tmp_path: Path):
    write("gemma3", tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="from scratch for a Gemma3Processor"):
        ScratchModel(architecture={"model_type": "gemma3"}).build(processor, with_weights=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [["vision_tower"], ["vision_tower", "projector"]], ids=str)
def test_a_frozen_tower_is_one_group_and_changes_nothing(
    family: Family, world: World, names: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
):
    """Against groups of its blocks, as those of a tower that is trained are."""
    batch, config = family.collator()(ROWS), ParallelConfig(device="cpu", compute_dtype=dtype)
    students = []
    for is_frozen in (shard.is_frozen, lambda tower: False):
        monkeypatch.setattr(shard, "is_frozen", is_frozen)
        student = Student(family.model(), ForwardKLConfig().build(0.0))
        student.freeze(names)
        student.distribute(world, config)
        students.append(student)
    states = [{b._get_fsdp_state() for b in blocks(s.model)} for s in students]
    assert [len(of_blocks) for of_blocks in states] == [3, 4]
    losses = [s.distill(batch, None, batch.num_targets).loss for s in students]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    both = (student.named_parameters() for student in students)
    for (name, p), (_, other) in zip(*both, strict=True):
        assert (p.grad is None) == (other.grad is None), name
        assert p.grad is None or torch.equal(local(p.grad), local(other.grad)), name


def test_a_tower_that_is_trained_in_part_is_sharded_block_by_block(family: Family):
    model = family.model()
    of_tower = blocks(model.get_encoder(modality="image"))
    apart, together = groups(model)
    assert set(of_tower) <= set(apart) and not together
    FrozenVLM(model)
    apart, together = groups(model)
    assert together == of_tower and not set(of_tower) & set(apart)
    next(of_tower[0].parameters()).requires_grad_(True)
    apart, together = groups(model)
    assert set(of_tower) <= set(apart) and not together


@pytest.mark.parametrize("frozen", [False, True])
def test_the_memory_estimate_counts_the_groups_there_are(
    family: Family, world: World, frozen: bool
):
    model = family.model()
    vlm = FrozenVLM(model) if frozen else Student(model, ForwardKLConfig().build(0.0))
    counted = Whole.of(model)
    vlm.distribute(world, ParallelConfig(device="cpu"))
    states = {m._get_fsdp_state() for m in vlm.modules() if isinstance(m, FSDPModule)}
    sizes = {
        state: sum(p._orig_size.numel() for p in state._fsdp_param_group.fsdp_params)
        for state in states
    }
    root = sizes.pop(vlm._get_fsdp_state())
    tower = sizes.pop(blocks(model.get_encoder(modality="image"))[0]._get_fsdp_state())
    embedding = model.get_input_embeddings()
    apart = sizes.pop(embedding._get_fsdp_state()) if isinstance(embedding, FSDPModule) else 0
    largest = max(*sizes.values(), 0 if frozen else tower)
    assert counted.root.parameters == root and counted.embedding.parameters == apart
    assert counted.block.parameters == largest
    assert counted.tower.parameters == (tower if frozen else 0)
    held = counted.gathered(vlm, ParallelConfig(device="cpu"))  # float32
    assert held.start == 4 * max(apart, counted.tower.parameters)
