"""Decoding with a draft says what the target says alone, and the evaluator knows in advance."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from kd.dflash import Decoded, Draft, Target, acceptance, generate, walks
from kd.types import UserError
from tests.dflash.conftest import BLOCK, TOKENS, Pair, build, sample
from tests.model.families import FAMILIES


@pytest.fixture(scope="module")
def draft(pair: Pair) -> Draft:
    """Right about some rows, wrong about others."""
    return pair.fitted(pair.greedy([sample(i) for i in range(8)]), steps=150)


def decode(pair: Pair, draft: Draft, numbers: range, stop_ids: list[int]) -> list[Decoded]:
    prompts = pair.collator.prompts([sample(i) for i in numbers])
    return generate(pair.target, draft, prompts, TOKENS, stop_ids, pair.forbidden_ids)


TEXT_ALONE = range(1, 37, 3)  # of different lengths, after prompts with images


@pytest.mark.parametrize(
    ("numbers", "at_once"), [(range(200), 10), (range(12), 1), (TEXT_ALONE, 6)]
)
def test_200_prompts_together_and_a_dozen_alone(pair, draft, numbers, at_once):
    lengths = set()
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        rollouts = pair.greedy([sample(i) for i in some])
        found = decode(pair, draft, some, pair.stop_ids)
        assert [row.response_ids for row in found] == [r.response_ids for r in rollouts], some
        assert [row.finished for row in found] == [r.finished for r in rollouts]
        lengths |= {row.accept_length for row in found}
    assert min(lengths) < 2 and max(lengths) > 2, "steps with rejections, and without"


def test_a_row_that_ends_leaves_the_others_alone(pair, draft):
    """Each token of the first row in turn ends a response: rows end at different steps."""
    for stop in set(pair.greedy([sample(0)])[0].response_ids):
        found = decode(pair, draft, range(6), [stop])
        for row, rollout in zip(found, pair.greedy([sample(i) for i in range(6)]), strict=True):
            ids = rollout.response_ids
            end = ids.index(stop) + 1 if stop in ids else TOKENS
            assert row.response_ids == ids[:end]
            assert row.finished == (stop in ids)


def test_the_evaluator_counts_the_steps_of_decoding(pair, draft):
    rollouts = pair.greedy([sample(i) for i in range(12)])
    decoded = decode(pair, draft, range(12), pair.stop_ids)
    out = pair.read(draft, pair.collator(list(rollouts)))
    found = walks(out.correct_AT, [len(r.response_ids) for r in rollouts])
    assert [len(walk.accepted) for walk in found] == [row.num_steps for row in decoded]
    assert [walk.accept_length for walk in found] == [row.accept_length for row in decoded]
    shares = [accepted / possible for accepted, possible in acceptance(found, BLOCK)]
    assert 0 < shares[0] < 1
    assert sum(possible for _, possible in acceptance(found, 2)) == sum(
        len(walk.accepted) for walk in found
    )


def test_fitted_to_one_sample_every_block_is_accepted(pair):
    said = ((i, pair.greedy([sample(i)])) for i in range(20))
    # Whole blocks after the first token.
    number, rollouts = next((i, r) for i, r in said if len(r[0].response_ids) == TOKENS)
    draft = pair.fitted(rollouts, steps=400)
    out = pair.read(draft, pair.collator(list(rollouts)))
    (walk,) = walks(out.correct_AT, [TOKENS])
    assert walk.accept_length == BLOCK
    (row,) = decode(pair, draft, range(number, number + 1), pair.stop_ids)
    assert row.accept_length == BLOCK
    assert row.response_ids == rollouts[0].response_ids


def test_a_target_whose_tokens_cannot_be_taken_back_is_refused(full):
    config, _ = FAMILIES["gemma3"]()
    target = Target(AutoModelForImageTextToText.from_config(config), [0])
    prompts = full.collator.prompts([sample(1)])
    with pytest.raises(UserError, match="sliding_attention"):
        generate(target, full.draft(), prompts, TOKENS, [0])


def test_a_walk_at_the_end_of_a_response():
    # Four tokens after the first: all of the first block of three accepted, then one is left.
    correct = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 0]])
    (walk,) = walks(correct, [5])
    assert walk.accepted == [2, 1] and walk.accept_length == 2
    assert acceptance([walk], 3) == [(2, 2), (1, 1)]


def test_kinds_are_what_they_are_called():
    kinds = build("hybrid").target.model.config.get_text_config().layer_types
    assert set(kinds) == {"linear_attention", "full_attention"}
