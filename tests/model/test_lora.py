"""Adapters on every family: what is trained, what is exported, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Qwen3VLMoeConfig,
)

from kd.loss import ForwardKLConfig
from kd.model import LoRAConfig, PretrainedModel, PretrainedStudent, Student, export
from kd.model.parts import parts
from kd.parallel import ParallelConfig, World
from kd.types import UserError
from tests.model.conftest import ONE, ROWS, TWO, UNREAD, Family
from tests.model.families import MROPE, QWEN_VISION, TEXT, write
from tests.precision import assert_same_rows, log_prob_rounding


def everywhere(family: Family, **changes) -> LoRAConfig:
    """On every part that has linear layers."""
    names = ["vision_tower", "projector", "layers"]
    if family.name == "gemma3":  # its projector is a matrix of its own
        names.remove("projector")
    return LoRAConfig(rank=2, alpha=8.0, parts=names, **changes)


def spec_of(family: Family, **lora) -> PretrainedStudent:
    return PretrainedStudent(
        name=str(family.folder), export_dtype="float32", lora=everywhere(family, **lora)
    )


def student_of(family: Family, dtype: str = "float32", **lora) -> Student:
    student = Student(family.model(dtype), ForwardKLConfig().build(0.5))
    student.adapt(everywhere(family, **lora), seed=0)
    return student


def train(family: Family, world: World, dtype: str = "float32") -> Student:
    """Sharded, after two steps: the first moves B alone, A has no gradient while B is 0."""
    student = student_of(family, dtype)
    student.distribute(world, ParallelConfig(device="cpu"))
    batch, teacher = family.collator()(ROWS), family.teacher()
    targets = teacher.targets(batch.teacher)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        student.distill(batch, targets, batch.num_targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


@pytest.fixture(scope="module")
def trained(family: Family, world: World) -> Student:
    return train(family, world)


@pytest.fixture(scope="module")
def merged(
    family: Family, world: World, trained: Student, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(family.name) / "merged"
    export(folder, trained, family.processor, spec_of(family), world)
    return folder


def loss_of(family: Family, student: Student) -> Tensor:
    batch = family.collator()(ROWS)
    targets = family.teacher().targets(batch.teacher)
    return student.distill(batch, targets, batch.num_targets).loss.detach()


def loaded(folder: Path) -> Student:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return Student(model, ForwardKLConfig().build(0.5))


def loss_rounding(family: Family, student: Student) -> float:
    """Of a loss, which adds up log-probabilities with weights that sum to one."""
    return log_prob_rounding(logits_of(family, student.model), student.model)


def logits_of(family: Family, model: PreTrainedModel | PeftModel) -> Tensor:
    batch = family.collator()(ROWS)
    with torch.no_grad():
        return model(**batch.student.model_inputs()).logits[batch.student.attention_mask_BS.bool()]


# ---- training ----------------------------------------------------------------------------------


def test_a_step_changes_every_adapter_and_nothing_else(family: Family, trained: Student):
    fresh = student_of(family)
    plain = loss_of(family, fresh)
    assert torch.equal(plain, loss_of(family, loaded(family.folder)))
    before = dict(fresh.named_parameters())
    after = {name: p.full_tensor() for name, p in trained.named_parameters()}
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    tower = parts(trained.model)["vision_tower"][0]
    unread = tuple(f"model.{tower}.{name}" for name in UNREAD.get(family.name, ()))
    adapters = {name for name in after if ".lora_" in name}
    assert moved == {name for name in adapters if not name.startswith(unread)}
    assert loss_of(family, trained) < plain


def test_checkpointed_activations_leave_the_gradients_of_adapters(family: Family):
    batch, grads = family.collator()(ROWS), []
    targets = family.teacher().targets(batch.teacher)
    for checkpoint in (False, True):
        student = student_of(family)
        if checkpoint:
            student.checkpoint_activations()
        student.distill(batch, targets, batch.num_targets).loss.backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0] and all(".lora_" in name for name in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


# ---- what comes of it --------------------------------------------------------------------------


def test_merged_it_is_a_model_that_computes_the_same(
    family: Family, trained: Student, merged: Path
):
    with (
        safe_open(merged / "model.safetensors", "pt") as ours,
        safe_open(family.folder / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
    AutoProcessor.from_pretrained(merged)
    whole = loaded(merged)
    ours, theirs = loss_of(family, trained), loss_of(family, whole)
    torch.testing.assert_close(ours, theirs, atol=loss_rounding(family, whole), rtol=0)

    prompts = family.collator().prompts([ONE, TWO])
    ask = prompts, 6, [family.processor.tokenizer.eos_token_id], []
    expected = whole.eval().generate(*ask)
    assert torch.equal(trained.generate(*ask), expected)
    with trained.gathered():
        assert torch.equal(trained.generate(*ask), expected)


def test_adapters_are_a_folder_that_peft_loads(
    family: Family, world: World, trained: Student, merged: Path, tmp_path: Path
):
    folder = tmp_path / "adapters"
    export(folder, trained, family.processor, spec_of(family, export="adapters"), world)
    found = PeftModel.from_pretrained(family.model(), folder)
    again = Student(found.get_base_model(), ForwardKLConfig().build(0.5))
    torch.testing.assert_close(loss_of(family, again), loss_of(family, trained))
    expected = logits_of(family, loaded(merged).model)
    assert_same_rows(logits_of(family, found), expected, found)
    assert (logits_of(family, family.model()) - expected).abs().max() > 0.5
    named = AutoPeftModel.from_pretrained(folder)  # the base by its name
    assert torch.equal(logits_of(family, named), logits_of(family, found))
    AutoProcessor.from_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 2 * len(trained.adapters.layers)


# ---- of one family for all ---------------------------------------------------------------------


@pytest.fixture
def one(tmp_path: Path) -> Family:
    write("qwen3_vl", tmp_path)
    return Family("qwen3_vl", tmp_path, tmp_path, AutoProcessor.from_pretrained(tmp_path))


def test_the_seed_settles_the_adapters_and_the_global_state_stays(one: Family):
    made: list[dict[str, Tensor]] = []
    for seed in (1, 1, 2):
        model = one.model()
        state = torch.get_rng_state()
        everywhere(one).inject(model, seed)
        assert torch.equal(state, torch.get_rng_state())
        made.append({name: p for name, p in model.named_parameters() if ".lora_A." in name})
        torch.rand(1)
    first, same, other = made
    assert first and all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_dropout_is_of_training_alone(one: Family):
    student = student_of(one, dropout=0.5)
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.1)
    assert not torch.equal(loss_of(one, student), loss_of(one, student))
    student.eval()
    assert torch.equal(loss_of(one, student), loss_of(one, student))


def test_over_a_base_held_in_bfloat16_adapters_are_float32(
    one: Family, world: World, tmp_path: Path
):
    """Merged, too: what is exported has not been rounded to the base's precision."""
    student = train(one, world, "bfloat16")
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}
    export(tmp_path / "export", student, one.processor, spec_of(one), world)
    whole = loaded(tmp_path / "export")
    ours, theirs = loss_of(one, student), loss_of(one, whole)
    torch.testing.assert_close(ours, theirs, atol=loss_rounding(one, whole), rtol=0)


def test_an_adapter_folder_is_no_model(one: Family, world: World, tmp_path: Path):
    folder = tmp_path / "adapters"
    spec = spec_of(one, export="adapters")
    student = student_of(one)
    student.distribute(world, ParallelConfig(device="cpu"))
    export(folder, student, one.processor, spec, world)
    with pytest.raises(UserError, match=r"adapters holds adapters, and no model: give the export"):
        PretrainedModel(name=str(folder)).build_processor(list)


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("lm_head", "lm_head holds the head, whose weight the loss reads as it is"),
        ("embeddings", "embeddings has no linear layer"),
        ("layers.1-2", r"student\.lora\.parts: layers\.1-2: the layers are 0 to 1"),
        ("layer", "student.lora.parts: layer is no part of"),
    ],
)
def test_parts_that_cannot_have_adapters(one: Family, part: str, says: str):
    with pytest.raises(UserError, match=says):
        LoRAConfig(rank=2, parts=["layers", part]).inject(one.model(), 0)


def test_a_projector_without_linear_layers(tmp_path: Path):
    write("gemma3", tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="projector has no linear layer"):
        LoRAConfig(rank=2, parts=["projector"]).inject(model, 0)


def test_experts_have_none():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3VLMoeConfig(
        text_config={**TEXT, **experts, "vocab_size": 99, "rope_parameters": MROPE},
        vision_config=QWEN_VISION,
    )
    model = AutoModelForImageTextToText.from_config(config)
    adapters = LoRAConfig(rank=2).inject(model, 0)
    assert {name.rsplit(".", 2)[1] for name in adapters.layers} == {"self_attn"}
    assert len(adapters.layers) == 8


def test_missing_peft_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing is installed, but for a folder `peft`."""
    (tmp_path / "peft").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    LoRAConfig().validate("student.lora")
    says = r'student\.lora\.rank=4 needs the package peft: pip install "kd-vlm\[lora\]"'
    with pytest.raises(UserError, match=says):
        LoRAConfig(rank=4).validate("student.lora")
