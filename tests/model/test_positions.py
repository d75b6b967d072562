"""Positions from the collator: those that each model's own forward finds, without its weights."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kd.data import Collator, Renderer
from kd.model import FrozenVLM, Positions, left_to_the_forward
from kd.types import Inputs, Sample
from tests.model.conftest import NONE, ONE, ROWS, TWO, Family

MROPE = {"qwen3_5", "qwen3_5_hybrid", "qwen3_vl", "qwen2_5_vl", "glm4v"}


def collators(family: Family, model: PreTrainedModel, lockstep: bool = False) -> list[Collator]:
    """One that leaves positions to the forward, and one that finds them."""
    found = Positions(model)
    sides = (left_to_the_forward, left_to_the_forward), (found, found)
    return [
        Collator(Renderer(family.processor), None, 2048, lockstep, positions=both) for both in sides
    ]


@torch.no_grad()
def read(model: PreTrainedModel, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Hidden states, and the positions that the language model was given."""
    seen: list[Tensor | None] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs.get("position_ids"))

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    hidden_BSD = model.base_model(**inputs.model_inputs(), use_cache=False).last_hidden_state
    handle.remove()
    (positions,) = seen
    return hidden_BSD, positions


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize(
    "rows", [ROWS, [TWO, ONE], [ONE], [NONE, NONE]], ids=["mixed", "images", "one", "text"]
)
def test_the_forward_is_the_one_that_finds_its_own(
    family: Family, rows: list[Sample], lockstep: bool
):
    model = family.model().eval()
    plain, given = (collate(rows) for collate in collators(family, model, lockstep))
    has_image = lockstep or any(row.images for row in rows)
    assert plain.student.position_ids is None
    assert (given.student.position_ids is not None) == (family.name in MROPE and has_image)
    assert given.teacher is given.student
    (own_BSD, own), (found_BSD, found) = (read(model, b.student) for b in (plain, given))
    assert torch.equal(own_BSD, found_BSD)
    assert own is found is None or (own is not None and found is not None and own.equal(found))


def test_packed_rows_have_the_positions_they_have_alone(family: Family):
    model = family.model()
    _, collate = collators(family, model)
    rows = collate.prepare([TWO, NONE, ONE])
    packed = collate.batch(rows, packed=True).student
    assert packed.position_ids is not None and packed.lengths is not None
    *_, length = packed.position_ids.shape
    assert packed.position_ids.shape == ((4, 1, length) if family.name in MROPE else (1, length))
    parts = packed.position_ids.view(-1, length).split(packed.lengths, dim=1)
    for row, found in zip(rows, parts, strict=True):
        text_S = torch.arange(found.shape[1])
        assert torch.equal(found[0], text_S)
        if family.name in MROPE:
            alone = collate.batch([row]).student
            own = text_S.expand(3, -1)
            if alone.media:
                names = ("mm_token_type_ids", "image_grid_thw")
                media = {name: alone.media.get(name) for name in names}
                own, _ = model.base_model.get_rope_index(alone.input_ids_BS, **media)
                own = own[:, 0]
            assert torch.equal(found[1:], own)


def test_packed_rows_without_an_image(family: Family):
    model = family.model()
    _, collate = collators(family, model)
    packed = collate.batch(collate.prepare([NONE, NONE]), packed=True).student
    assert packed.position_ids is not None and packed.lengths is not None
    assert packed.position_ids.tolist() == [[i for n in packed.lengths for i in range(n)]]


def test_it_travels_without_weights(family: Family):
    model = family.model()
    sent = pickle.dumps(Positions(model))
    assert len(sent) < 100_000 < sum(p.nbytes for p in model.parameters())
    inputs = family.collator()(ROWS).student
    there, here = pickle.loads(sent)(inputs), Positions(model)(inputs)
    assert there is here is None or torch.equal(there, here)


def test_generating_does_not_remember_what_was_read(family: Family):
    """A forward that is given positions leaves what the model remembers as it is."""
    model = family.model().eval()
    vlm = FrozenVLM(model)
    _, collate = collators(family, model)

    def answers(*rows: Sample) -> list[list[int]]:
        prompts = collate.prompts(list(rows))
        assert prompts.position_ids is None
        return vlm.generate(prompts, 5, [0], []).tolist()

    expected = [answers(TWO, ONE), answers(NONE), answers(ONE)]
    for rows, own in zip([(TWO, ONE), (NONE,), (ONE,)], expected, strict=True):
        vlm.read(collate(ROWS).student)
        assert answers(*rows) == own
        vlm.read(collate([ONE]).student)
        assert answers(*rows) == own


def test_a_teacher_with_other_positions_reads_the_same_tensors(family: Family):
    found = Positions(family.model())
    sides = found, left_to_the_forward
    batch = Collator(Renderer(family.processor), None, 2048, False, positions=sides)(ROWS)
    assert batch.teacher.position_ids is None
    copied = batch.map(torch.clone)
    for made in (batch, copied):
        assert made.teacher.input_ids_BS is made.student.input_ids_BS
        for name, x in made.student.media.items():
            assert made.teacher.media[name] is x
        given = made.student.position_ids
        assert (given is not None) == (made.teacher is not made.student) == (family.name in MROPE)
