"""Batches by the real processor, from real images."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from PIL import Image

from kd.data import Collator, Renderer
from kd.types import IGNORE_INDEX, Batch, Inputs, Rejected, Rollout, Sample

COLORS = ["red", "green", "blue"]


def row(name: str, *sizes: tuple[int, int], answer: str | None = "It is odd.") -> Sample:
    content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": f"Row {name}?"}]
    images = [Image.new("RGB", size, color) for size, color in zip(sizes, COLORS, strict=False)]
    return Sample(name, [{"role": "user", "content": content}], images, answer)


@pytest.fixture
def collator(processor) -> Collator:
    return Collator(Renderer(processor), None, 256, lockstep=False)


MIXED = [
    row("one", (64, 64), answer="The digit is three."),
    row("text", answer="Yes."),
    row("two", (64, 64), (192, 64), answer="No, it is not larger."),
]


def responses(inputs: Inputs, batch: Batch) -> list[list[int]]:
    """Per row, the labels found at `target_rows_N` of a rendering."""
    length = inputs.input_ids_BS.shape[1]
    rows: list[list[int]] = [[] for _ in inputs.input_ids_BS]
    for place, label in zip(inputs.target_rows_N.tolist(), batch.labels_N.tolist(), strict=True):
        rows[place // length].append(label)
    return rows


def test_labels_are_answer_and_eos_predicted_one_earlier(collator, processor):
    batch = collator(MIXED)
    decoded = [processor.tokenizer.decode(ids) for ids in responses(batch.student, batch)]
    assert decoded == [f"{sample.answer}<|im_end|>" for sample in MIXED]
    assert batch.samples == MIXED
    # What position s is to predict is what stands at s + 1.
    ids_BS, labels_BS = batch.student.input_ids_BS, batch.labels_BS
    b, s = (labels_BS != IGNORE_INDEX).nonzero(as_tuple=True)
    assert torch.equal(labels_BS[b, s], ids_BS[b, s + 1])
    assert torch.equal(labels_BS.flatten()[batch.student.target_rows_N], batch.labels_N)
    assert (labels_BS != IGNORE_INDEX).sum() == batch.num_targets == len(batch.labels_N)


def test_prompt_ends_where_the_assistant_begins(collator, processor):
    batch = collator(MIXED)
    for b, sample in enumerate(MIXED):
        first = int((batch.labels_BS[b] != IGNORE_INDEX).nonzero()[0])
        prompt = processor.tokenizer.decode(batch.student.input_ids_BS[b, : first + 1])
        assert prompt.endswith(f"Row {sample.id}?<|im_end|>\n<|im_start|>assistant\n")


def test_padding_is_on_the_right_and_masked(collator, processor):
    inputs = collator(MIXED).student
    lengths = inputs.attention_mask_BS.sum(1)
    assert len(set(lengths.tolist())) == 3
    for ids, mask, n in zip(inputs.input_ids_BS, inputs.attention_mask_BS, lengths, strict=True):
        assert mask[:n].all()
        assert not mask[n:].any()
        assert (ids[n:] == processor.tokenizer.pad_token_id).all()
        assert (ids[:n] != processor.tokenizer.pad_token_id).all()


def test_images_have_their_tokens_and_patches(collator, processor):
    inputs = collator(MIXED).student
    # 64x64 is 4x4 patches of 16, merged 2 by 2; 192x64 is 4x12. Rows 0, 2, 2.
    assert inputs.media["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4], [1, 4, 12]]
    assert inputs.media["pixel_values"].shape == (16 + 16 + 48, 3 * 2 * 16 * 16)
    is_image_BS = inputs.input_ids_BS == processor.image_token_id
    assert is_image_BS.sum(1).tolist() == [4, 0, 4 + 12]
    assert torch.equal(inputs.media["mm_token_type_ids"], is_image_BS.long())
    red, green = 0, 1
    patch = inputs.media["pixel_values"].reshape(80, 3, 2, 16, 16).mean((2, 3, 4))
    assert patch[20].argmax() == red
    assert patch[40].argmax() == green


def test_text_only_batch_has_no_pixels(collator):
    batch = collator([MIXED[1]])
    assert set(batch.student.media) == {"mm_token_type_ids"}
    assert batch.num_targets > 0


def test_row_is_the_same_in_any_company(collator):
    together = collator(MIXED)
    for b, sample in enumerate(MIXED):
        alone = collator([sample])
        n = alone.student.input_ids_BS.shape[1]
        assert torch.equal(together.student.input_ids_BS[b, :n], alone.student.input_ids_BS[0])
        assert torch.equal(together.labels_BS[b, :n], alone.labels_BS[0])


def test_rollout_ids_are_kept_as_sampled(collator, processor):
    # Two ids that decode to "It", which the tokenizer would write as it likes; no EOS: cut short.
    ids = [processor.tokenizer.convert_tokens_to_ids(letter) for letter in "It"]
    own = Rollout(MIXED[0], ids, finished=False, policy_step=3)
    batch = collator([own, MIXED[1], dataclasses.replace(own, policy="teacher")])
    places_N = batch.student.target_rows_N
    assert batch.student.input_ids_BS.flatten()[places_N[:2] + 1].tolist() == ids
    # The student's own are compared with the teacher, never learnt as labels.
    first, _, last = responses(batch.student, batch)
    assert (first, last) == ([IGNORE_INDEX] * 2, ids)
    assert batch.num_targets == len(places_N) == len(batch.labels_N)
    assert batch.samples == [MIXED[0], MIXED[1], MIXED[0]]


def test_rendering_ahead_changes_nothing(collator):
    """Also where a worker process has sent the rows."""
    rendered = pickle.loads(pickle.dumps(collator.render(MIXED)))
    ours, theirs = collator(rendered), collator(MIXED)
    assert torch.equal(ours.student.input_ids_BS, theirs.student.input_ids_BS)
    assert torch.equal(ours.labels_N, theirs.labels_N)
    for name, x in theirs.student.media.items():
        assert torch.equal(ours.student.media[name], x), name
    prompts = collator.prompts(rendered).input_ids_BS
    assert torch.equal(prompts, collator.prompts(MIXED).input_ids_BS)


def test_too_long_is_named_and_never_cut(collator):
    long = row("long", (64, 64), answer="odd " * 300)
    batch = collator([MIXED[0], long])
    assert batch.samples == [MIXED[0]]
    (rejected,) = batch.rejected
    assert (rejected.id, rejected.broken) == ("long", False)
    assert "more than data.max_length 256" in rejected.reason


def test_too_long_by_its_images_says_so(processor, sharp_processor):
    """How many tokens are theirs, on which side, and what to do."""
    sides = Renderer(processor), Renderer(sharp_processor)
    wide, text = row("wide", (512, 256), (64, 64)), row("text", answer="odd " * 300)
    rejected = Collator(sides[0], None, 100, lockstep=False)([wide, text]).rejected
    # 16 x 8 tokens and 2 x 2, one of either written by the chat template.
    assert rejected[0].reason.endswith(
        "more than data.max_length 100 (132 of them for images: raise it, or make the images "
        "smaller by student.processor.max_pixels or student.processor.image)"
    )
    assert "image" not in rejected[1].reason
    (rejected,) = Collator(*sides, 60, lockstep=False)([row("small", (64, 64), (64, 64))]).rejected
    assert "(32 of them for images: " in rejected.reason
    assert "teacher.processor.image" in rejected.reason


def test_length_limit_is_exact(processor):
    generous = Collator(Renderer(processor), None, 4096, lockstep=False)
    length = generous([MIXED[0]]).student.input_ids_BS.shape[1]
    fits = Collator(Renderer(processor), None, length, lockstep=False)([MIXED[0]])
    exceeds = Collator(Renderer(processor), None, length - 1, lockstep=False)([MIXED[0]])
    assert (len(fits.rejected), len(exceeds.rejected)) == (0, 1)


def test_teacher_with_other_pixels_meets_the_student_at_the_response(processor, sharp_processor):
    student, teacher = Renderer(processor), Renderer(sharp_processor)
    batch = Collator(student, teacher, 256, lockstep=False)(MIXED)
    assert batch.teacher.input_ids_BS.shape[1] > batch.student.input_ids_BS.shape[1]
    assert batch.teacher.media["image_grid_thw"][0].tolist() == [1, 8, 8]
    assert responses(batch.teacher, batch) == responses(batch.student, batch)
    predicted = batch.teacher.input_ids_BS.flatten()[batch.teacher.target_rows_N + 1]
    assert torch.equal(predicted, batch.labels_N)


def test_row_too_long_for_the_teacher_only_is_dropped(processor, sharp_processor):
    batch = Collator(Renderer(processor), Renderer(sharp_processor), 60, lockstep=False)(MIXED)
    assert [r.id for r in batch.rejected] == ["two"]
    assert Collator(Renderer(processor), None, 60, lockstep=False)(MIXED).rejected == []


def test_teacher_that_reads_the_same_is_the_same_object(collator):
    batch = collator(MIXED)
    assert batch.teacher is batch.student
    assert batch.to("cpu").teacher is not None


@pytest.mark.parametrize("lockstep", [False, True])
def test_batch_without_rows_is_valid(processor, lockstep):
    broken = Rejected("bad", "unreadable", broken=True)
    batch = Collator(Renderer(processor), None, 256, lockstep)([broken])
    assert batch.samples == []
    assert batch.rejected == [broken]
    assert batch.num_targets == 0
    assert (batch.labels_BS == IGNORE_INDEX).all()
    assert batch.student.input_ids_BS.shape[0] == 1
    assert batch.student.attention_mask_BS.all()
    assert ("pixel_values" in batch.student.media) == lockstep


def test_lockstep_adds_an_image_only_where_there_is_none(processor):
    collator = Collator(Renderer(processor), None, 256, lockstep=True)
    text, mixed = collator([MIXED[1]]), collator(MIXED)
    assert text.student.input_ids_BS.shape[0] == 2
    assert text.samples == [MIXED[1]]
    assert text.student.media["image_grid_thw"].shape == (1, 3)
    assert (text.labels_BS[1] == IGNORE_INDEX).all()
    assert responses(text.student, text)[1] == []
    assert mixed.student.input_ids_BS.shape[0] == len(MIXED)


def test_row_without_an_answer_is_broken(collator):
    (rejected,) = collator([row("mute", answer=None)]).rejected
    assert (rejected.broken, rejected.reason) == (True, "it has no answer")


@pytest.mark.parametrize("place", ["question", "answer"])
def test_control_token_in_text_is_broken(collator, place):
    sample = row("sly", (64, 64), answer="Yes.<|im_end|>" if place == "answer" else "Yes.")
    if place == "question":
        sample.messages[0]["content"][1]["text"] = "Look: <|image_pad|>"
    (rejected,) = collator([sample]).rejected
    assert rejected.broken
    assert "contains the control token '<|im" in rejected.reason


def test_image_the_processor_refuses_is_broken(collator):
    (rejected,) = collator([row("thin", (4000, 2))]).rejected
    assert rejected.broken
    assert "the processor refuses it" in rejected.reason


def test_prompts_are_padded_on_the_left(collator, processor):
    inputs = collator.prompts(MIXED)
    assert inputs.target_rows_N.shape == (0,)
    for b in range(len(MIXED)):
        n = int(inputs.attention_mask_BS[b].sum())
        assert inputs.attention_mask_BS[b, -n:].all()
        text = processor.tokenizer.decode(inputs.input_ids_BS[b, -n:])
        assert text.startswith("<|im_start|>user")
        assert text.endswith("<|im_start|>assistant\n")
    is_image_BS = inputs.input_ids_BS == processor.image_token_id
    assert torch.equal(inputs.media["mm_token_type_ids"], is_image_BS.long())
    assert inputs.media["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4], [1, 4, 12]]


def test_prompts_follow_the_lockstep_rule(processor):
    lockstep = Collator(Renderer(processor), None, 256, lockstep=True)
    assert lockstep.prompts([MIXED[1]]).input_ids_BS.shape[0] == 2
    assert lockstep.prompts([]).media["image_grid_thw"].shape == (1, 3)
    assert lockstep.prompts(MIXED).input_ids_BS.shape[0] == 3


def test_screen_leaves_room_for_the_response(collator):
    bad = Rejected("bad", "unreadable", broken=True)
    prompt_only = row("prompt", (64, 64), answer=None)
    length = collator.prompts([prompt_only]).input_ids_BS.shape[1]
    usable, rejected = collator.screen([prompt_only, bad], 256 - length)
    assert ([sample.id for sample in usable], rejected) == (["prompt"], [bad])
    usable, rejected = collator.screen([prompt_only], 256 - length + 1)
    assert (usable, [r.broken for r in rejected]) == ([], [False])


def test_chat_template_kwargs_reach_the_template(processor):
    template = processor.chat_template + "{% if think %}<think>{% endif %}"
    renderer = Renderer(processor, {"chat_template": template, "think": True})
    prompt = renderer.prompt(MIXED[1])
    assert processor.tokenizer.decode(prompt.ids_S).endswith("<think>")
