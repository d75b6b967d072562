"""Generation by the policy's own model: a real tiny Qwen3.5 with images and text."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from PIL import Image
from torch.distributed.fsdp import FSDPModule

from kd.data import Collator, Renderer
from kd.data.digits import all_texts
from kd.loss import ReverseKLConfig
from kd.model import ScratchModel, Student, cut
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig
from kd.rollout.engine import Policy, Sampling
from kd.rollout.hf import HFEngine, HFEngineConfig
from kd.rollout.sampling import Draw, uniforms
from kd.types import Rollout, Sample
from tests.model.test_model import ARCHITECTURE


def row(name: str, *sizes: tuple[int, int]) -> Sample:
    images = [Image.new("RGB", size, (40 * len(sizes), 90, 10)) for size in sizes]
    text = {"type": "text", "text": f"What about {name}? " + "Which digit? " * len(name)}
    content = [*({"type": "image"} for _ in images), text]
    return Sample(name, [{"role": "user", "content": content}], images, None)


ROWS = [row("a", (64, 64)), row("text"), row("several", (64, 64), (96, 64)), row("text again")]
SEEDS = [11, 12, 13, 14]


@pytest.fixture(scope="module")
def policy():
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    processor = build_processor(all_texts())
    model = ScratchModel(architecture=ARCHITECTURE, seed=1).build(processor, with_weights=True)
    with torch.no_grad():  # nearly uniform else, and alike for every prompt
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    vlm = Student(model, ReverseKLConfig().build(1.0))
    vlm.distribute(world, ParallelConfig(compute_dtype="float64"))
    collator = Collator(Renderer(processor), None, 512, lockstep=False)
    stop = vlm.stop_ids(processor.tokenizer.eos_token_id)
    never = vlm.forbidden_ids(len(processor.tokenizer))
    yield Policy(vlm, processor, collator.prompts, stop, never, world, 512)
    world.close()


def engine(policy: Policy, **settings) -> HFEngine:
    return HFEngine(policy, HFEngineConfig(**settings))


def ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids for rollout in rollouts]


def test_rollouts_come_prompt_by_prompt_and_differ(policy):
    found = engine(policy).generate(ROWS, 3, Sampling(max_new_tokens=12), SEEDS)
    assert [rollout.sample.id for rollout in found] == [row.id for row in ROWS for _ in range(3)]
    assert len({tuple(response) for response in ids(found)}) == len(found)
    for rollout in found:
        response = rollout.response_ids
        stops = [i for i, token in enumerate(response) if token in policy.stop_ids]
        assert stops == ([len(response) - 1] if rollout.finished else [])
        assert rollout.finished or len(response) == 12
        assert not set(response) & set(policy.forbidden_ids)


@pytest.mark.parametrize("settings", [{"token_budget": 1}, {"gather": False}])
def test_what_else_is_generated_changes_nothing(policy, settings):
    sampling = Sampling(max_new_tokens=12, temperature=0.9)
    together = engine(policy).generate(ROWS, 2, sampling, SEEDS)
    assert ids(engine(policy, **settings).generate(ROWS, 2, sampling, SEEDS)) == ids(together)
    alone = engine(policy).generate(ROWS[1:2], 2, sampling, SEEDS[1:2])
    assert ids(alone) == ids(together)[2:4]
    other = engine(policy).generate(ROWS, 2, sampling, [seed + 1 for seed in SEEDS])
    assert ids(other) != ids(together)


def test_greedy_is_the_model_s_own(policy):
    found = engine(policy).generate(ROWS, 1, Sampling(temperature=0, max_new_tokens=8), SEEDS)
    prompts = policy.prompts(ROWS)
    with policy.vlm.gathered():
        expected = policy.vlm.model.generate(
            **prompts.model_inputs(),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=policy.stop_ids,
            pad_token_id=policy.stop_ids[0],
            suppress_tokens=policy.forbidden_ids,
        )
    length = prompts.input_ids_BS.shape[1]
    assert len({tuple(response) for response in ids(found)}) == len(ROWS), "not degenerate"
    assert ids(found) == [x for x, _ in cut(expected[:, length:], policy.stop_ids)]


def test_what_is_generated_is_what_training_finds_likeliest(policy):
    """Left-padded and cached against right-padded and whole: the same logits."""
    found = engine(policy).generate(ROWS, 1, Sampling(temperature=0, max_new_tokens=8), SEEDS)
    batch = Collator(Renderer(policy.processor), None, 512, lockstep=False)(found)
    with policy.vlm.gathered(), torch.no_grad():
        logits = policy.vlm.model(**batch.student.model_inputs()).logits.flatten(0, 1)
    logits_NV = logits[batch.student.target_rows_N]
    logits_NV[:, policy.forbidden_ids] = -torch.inf
    assert logits_NV.argmax(-1).tolist() == [token for response in ids(found) for token in response]


def test_long_prompts_come_first_and_batches_keep_to_the_budget(policy):
    lengths = [policy.prompts([row]).input_ids_BS.shape[1] for row in ROWS]
    assert lengths != sorted(lengths, reverse=True)
    batches = engine(policy, token_budget=260)._batches(ROWS, 2, 10)
    order = [lengths[i // 2] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        longest = max(lengths[i // 2] for i in batch)
        assert len(batch) == 1 or len(batch) * (longest + 10) <= 260
    assert len(batches) > 1


def test_a_head_padded_beyond_the_tokenizer_never_speaks(policy):
    unused = policy.vlm.forbidden_ids(100)
    vocab = policy.vlm.model.config.get_text_config().vocab_size
    assert set(range(100, vocab)) < set(unused)
    never = dataclasses.replace(policy, forbidden_ids=unused)
    found = engine(never).generate(ROWS, 2, Sampling(max_new_tokens=12), SEEDS)
    assert max(token for response in ids(found) for token in response) < 100


def test_a_filler_row_ends_at_once():
    scores_BV = torch.zeros(3, 10)
    draw = Draw(Sampling(), uniforms([1, 2], 1, 4), 5, 7)
    picked = draw(torch.zeros(3, 6, dtype=torch.int64), scores_BV)
    assert picked[2].argmax() == 7 and picked[2].isfinite().sum() == 1


def test_any_stop_id_ends_a_response_and_stays_in_it(policy):
    found = engine(policy).generate(ROWS, 4, Sampling(max_new_tokens=12), SEEDS)
    second = found[0].response_ids[1]
    more = dataclasses.replace(policy, stop_ids=[*policy.stop_ids, second])
    again = engine(more).generate(ROWS, 4, Sampling(max_new_tokens=12), SEEDS)
    assert again[0].response_ids == found[0].response_ids[:2] and again[0].finished
    for before, after in zip(ids(found), ids(again), strict=True):
        end = before.index(second) + 1 if second in before else len(before)
        assert after == before[:end]


def test_no_prompt_on_a_rank_is_no_rollout(policy):
    for gather in (True, False):
        assert engine(policy, gather=gather).generate([], 3, Sampling(), []) == []


def test_afterwards_the_model_trains_as_before(policy):
    assert policy.vlm.training
    engine(policy).generate(ROWS, 1, Sampling(max_new_tokens=2), SEEDS)
    assert policy.vlm.training
    groups = [module for module in policy.vlm.modules() if isinstance(module, FSDPModule)]
    assert len(groups) > 2
    states = [group._get_fsdp_state()._fsdp_param_group for group in groups]
    assert all(state is None or state.is_sharded for state in states)
    assert all(p.dtype == torch.float32 for p in policy.vlm.parameters())  # not the gathered ones


def drawn(logits: list[float], sampling: Sampling, draws: int = 20000) -> dict[int, float]:
    """How often each token is drawn."""
    scores_BV = torch.tensor(logits).expand(draws, -1)
    u_BT = uniforms(list(range(draws)), 1, 1)
    picked = Draw(sampling, u_BT, 0, 9)(torch.empty(draws, 0, dtype=torch.int64), scores_BV)
    assert torch.equal(picked.isfinite().sum(-1), torch.ones(draws, dtype=torch.int64))
    return {
        k: n / draws for k, n in sorted(collections.Counter(picked.argmax(-1).tolist()).items())
    }


def test_tokens_are_drawn_as_likely_as_they_are():
    logits = [1.0, -torch.inf, 2.0, 0.0, -0.5]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(-1).tolist()
        found = drawn(logits, Sampling(temperature=temperature))
        assert set(found) == {0, 2, 3, 4}, "a token of probability 0 is never drawn"
        assert [found.get(k, 0) for k in range(5)] == pytest.approx(expected, abs=0.015)
    top = torch.tensor([1.0, 2.0]).softmax(-1).tolist()
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.75)):
        found = drawn(logits, sampling)
        assert list(found) == [0, 2] and list(found.values()) == pytest.approx(top, abs=0.015)


def test_the_numbers_are_uniform_and_depend_on_seed_and_generation_alone():
    u_RT = uniforms([5, 6], 2, 4000)
    assert u_RT.shape == (4, 4000) and u_RT.min() >= 0 and u_RT.max() < 1
    assert torch.equal(uniforms([6], 1, 100), u_RT[2:3, :100])
    assert u_RT.mean(1).tolist() == pytest.approx([0.5] * 4, abs=0.02)
    correlation = torch.corrcoef(u_RT) - torch.eye(4)
    assert correlation.abs().max() < 0.06


def test_cut_keeps_the_first_stop_and_nothing_after_it():
    ids_BS = torch.tensor([[5, 2, 9, 2], [5, 6, 7, 8], [2, 2, 2, 2], [5, 9, 2, 2]])
    assert cut(ids_BS, [2, 9]) == [
        ([5, 2], True),
        ([5, 6, 7, 8], False),
        ([2], True),
        ([5, 9], True),
    ]
