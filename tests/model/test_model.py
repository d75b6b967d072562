from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen3Config, Qwen3ForCausalLM

from kd.data import Collator, Renderer
from kd.loss import ForwardKLConfig
from kd.model import (
    FrozenVLM,
    PretrainedModel,
    ProcessorConfig,
    ScratchModel,
    Student,
    pair,
    same_rendering,
    tokenizer_difference,
)
from kd.model.tiny import build_processor
from kd.types import Sample, UserError

TEXTS = ["What is in the picture?", "A red square.", "A blue circle."]
ARCHITECTURE = {
    "model_type": "qwen3_5",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["full_attention", "full_attention"],
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    },
}


def scratch(**changes) -> ScratchModel:
    return ScratchModel(architecture=ARCHITECTURE, **changes)


@pytest.fixture(scope="module")
def processor():
    return build_processor(TEXTS, 320)


def batch(processor, count: int = 2):
    rows = [
        Sample(
            str(i),
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXTS[0]}]}],
            [Image.new("RGB", (64, 64), (80 * i, 0, 0))],
            TEXTS[1 + i],
        )
        for i in range(count)
    ]
    return Collator(Renderer(processor), None, 256, lockstep=False)(rows)


def test_hidden_states_and_head_give_the_models_own_logits(processor):
    model = scratch().build(processor, with_weights=True)
    vlm = FrozenVLM(model)
    made = batch(processor)
    targets = vlm.targets(made.student)
    logits = targets.hidden_ND @ targets.weight_VD.T
    whole = model(**made.student.model_inputs()).logits.flatten(0, 1)
    torch.testing.assert_close(logits, whole[made.student.target_rows_N])


def test_distill_at_ratio_0_is_the_models_own_loss(processor):
    model = scratch().build(processor, with_weights=True)
    student = Student(model, ForwardKLConfig().build(0.0))
    made = batch(processor)
    out = student.distill(made, None, made.num_targets)
    logits = model(**made.student.model_inputs()).logits
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), made.labels_BS.flatten())
    torch.testing.assert_close(out.loss, ce)
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    theirs = torch.autograd.grad(ce, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_same_seed_same_weights_and_the_global_state_stays(processor):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (
        scratch(seed=seed).build(processor, with_weights=True).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_ranks_without_weights_have_the_same_shapes_and_ties(processor, tmp_path):
    real = scratch().build(processor, with_weights=True)
    real.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for spec in (scratch(), PretrainedModel(name=str(tmp_path))):
        bare = spec.build(processor, with_weights=False)
        shapes = {name: p.shape for name, p in bare.named_parameters()}
        assert shapes == {name: p.shape for name, p in real.named_parameters()}
        assert bare.get_input_embeddings().weight is bare.get_output_embeddings().weight
        for name, buffer in real.named_buffers():
            assert torch.equal(buffer, bare.get_buffer(name)), name


def test_frozen_parts(processor):
    student = Student(scratch().build(processor, with_weights=True), ForwardKLConfig().build(0.0))
    student.freeze(["model.visual"])
    frozen = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("model.visual.") for name in frozen)
    with pytest.raises(UserError, match="visul is no part of Qwen3_5ForConditionalGeneration"):
        student.freeze(["model.visul"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        student.freeze(["model"])


def test_a_student_trains_and_a_teacher_does_not(processor, tmp_path):
    scratch().build(processor, with_weights=True).save_pretrained(tmp_path)
    loaded = PretrainedModel(name=str(tmp_path)).build(processor, with_weights=True)
    assert Student(loaded, ForwardKLConfig().build(0.0)).model.training
    teacher = FrozenVLM(scratch().build(processor, with_weights=True))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_head_with_a_soft_cap_is_refused(processor):
    model = scratch().build(processor, with_weights=True)
    model.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match=r"final_logit_softcapping=30\.0"):
        FrozenVLM(model)


def test_greedy_answers_do_not_depend_on_the_models_generation_settings(processor):
    model = scratch().build(processor, with_weights=True)
    student = Student(model, ForwardKLConfig().build(0.0)).eval()
    prompts = Collator(Renderer(processor), None, 256, lockstep=False).prompts(
        batch(processor).samples
    )
    plain = student.generate(prompts, 8, [processor.tokenizer.eos_token_id], [])
    model.generation_config.suppress_tokens = plain.unique().tolist()
    model.generation_config.repetition_penalty = 9.0
    again = student.generate(prompts, 8, [processor.tokenizer.eos_token_id], [])
    assert torch.equal(plain, again)
    assert model.generation_config.repetition_penalty == 9.0


def test_pixel_bounds_change_the_number_of_image_tokens(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    image = Image.new("RGB", (256, 256))

    def tokens(config: ProcessorConfig) -> int:
        spec = PretrainedModel(name="a model", processor=replace(config, name=str(tmp_path)))
        grid = spec.build_processor(list).image_processor([image], return_tensors="pt")
        return int(grid["image_grid_thw"].prod()) // 4

    assert tokens(ProcessorConfig()) == 64
    assert tokens(ProcessorConfig(max_pixels=64 * 64)) == 4
    assert tokens(ProcessorConfig(min_pixels=512 * 512)) == 256
    with pytest.raises(UserError, match="give 1 <= min_pixels <= max_pixels"):
        ProcessorConfig(min_pixels=9, max_pixels=4).validate("student")


def test_rendering_is_compared_by_what_it_does(processor, tmp_path):
    processor.save_pretrained(tmp_path)

    def load(config: ProcessorConfig):
        return PretrainedModel(name="a model", processor=config).build_processor(list)

    assert same_rendering(processor, load(ProcessorConfig(str(tmp_path))))
    smaller = ProcessorConfig(str(tmp_path), max_pixels=64 * 64)
    assert not same_rendering(processor, load(smaller))


def test_the_pairing_follows_from_tokenizers_and_renderings(processor, tmp_path):
    other = build_processor([*TEXTS, "Eine gelbe Sonne, zweimal: Sonne, Sonne."], 320)
    again = build_processor(TEXTS, 320)
    processor.save_pretrained(tmp_path)
    smaller = PretrainedModel(
        name="a model", processor=ProcessorConfig(str(tmp_path), max_pixels=64 * 64)
    ).build_processor(list)

    def case(teacher, kwargs=({}, {}), alignment="auto") -> tuple[bool, bool]:
        found = pair(processor, teacher, kwargs, alignment)
        return found.by_bytes, found.same_prompts

    assert case(again) == (False, True)
    assert case(smaller) == case(again, ({}, {"enable_thinking": False})) == (False, False)
    assert case(other) == (True, False)
    assert case(again, alignment="bytes") == (True, True)
    assert "different tokenizers: " in pair(processor, other, ({}, {}), "auto").explain()
    with pytest.raises(UserError, match=r"alignment=tokens, but different tokenizers: .* differ"):
        case(other, alignment="tokens")


def test_another_end_of_a_response_is_another_tokenizer(processor):
    other = build_processor(TEXTS, 320)
    assert tokenizer_difference(processor.tokenizer, other.tokenizer) is None
    other.tokenizer.eos_token = "<|endoftext|>"
    assert "different ends" in str(tokenizer_difference(processor.tokenizer, other.tokenizer))


def test_parts_are_frozen_by_name(processor):
    student = Student(scratch().build(processor, with_weights=True), ForwardKLConfig().build(0.0))
    student.freeze(["vision_tower", "projector", "layers.0"])
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert trained and not any("visual" in name or "layers.0." in name for name in trained)
    assert any("layers.1." in name for name in trained)
    with pytest.raises(UserError, match=r"layers\.1-2: the layers are 0 to 1"):
        student.freeze(["layers.1-2"])


def test_a_text_model_is_refused(processor, tmp_path):
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\(qwen3\) has no image part"):
        PretrainedModel(name=str(tmp_path)).build(processor, with_weights=True)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no image part"):
        PretrainedModel(name=str(tmp_path)).build_processor(list)


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match=r"cannot load \./nowhere/model: there is no such folder"):
        PretrainedModel(name="./nowhere/model").build_processor(list)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no model"):
        PretrainedModel(name=str(tmp_path)).build(None, with_weights=True)


def test_untied_head_has_its_own_gradient(processor):
    untied = {**ARCHITECTURE, "tie_word_embeddings": False}
    untied["text_config"] = {**ARCHITECTURE["text_config"], "tie_word_embeddings": False}
    model = ScratchModel(architecture=untied).build(processor, with_weights=True)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    student = Student(model, ForwardKLConfig().build(0.0))
    made = batch(processor)
    student.distill(made, None, made.num_targets).loss.backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_answers_end_at_eos_and_come_back_left_padded(processor):
    model = scratch().build(processor, with_weights=True)
    student = Student(model, ForwardKLConfig().build(0.0))
    collator = Collator(Renderer(processor), None, 256, lockstep=False)
    rows = batch(processor).samples
    ids = student.generate(collator.prompts(rows), 5, [processor.tokenizer.eos_token_id], [])
    assert ids.shape[0] == 2
    assert 1 <= ids.shape[1] <= 5
    assert AutoModelForImageTextToText._model_mapping[type(model.config)] is type(model)
