"""The vllm engine against a real server. Run by scripts/test_vllm.sh."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import httpx
import pytest
import torch
from PIL import Image

from kd.data import Collator, Renderer
from kd.data.digits import all_texts
from kd.model.tiny import build_processor
from kd.rollout import Sampling
from kd.rollout.vllm import VllmEngineConfig
from kd.rollout.vllm_chat import chat_request
from kd.types import Rollout, Sample, UserError
from tests.processes import LIMIT_S, join

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def sample(name: str, *parts: str | tuple[int, int, int]) -> Sample:
    """A question of texts and of plain pictures, given by their colours."""
    content, images = [], []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image"})
            images.append(Image.new("RGB", (64 + 32 * len(images), 64), part))
    return Sample(name, [{"role": "user", "content": content}], images, None)


def conversation() -> Sample:
    """Text as plain strings, over several turns."""
    turns = [("system", "Be brief."), ("user", "How many?"), ("assistant", "Two."), ("user", "So?")]
    return Sample("talk", [{"role": r, "content": t} for r, t in turns], [], None)


RED, BLUE, GREEN = (200, 10, 10), (10, 20, 220), (0, 180, 40)
PROMPTS = [
    sample("none", "What is odd?"),
    sample("one", RED, "What is in the picture?"),
    conversation(),
    sample("two", "First", BLUE, "then", GREEN, "\n What is the difference?"),
    sample("other", BLUE, "What is in the picture?"),
]
SEEDS = [7, 8, 9, 10, 11]
SAMPLING = Sampling(max_new_tokens=24)


@pytest.fixture
def config(server) -> VllmEngineConfig:
    return VllmEngineConfig(
        urls=[server.url], weights_dtype="float32", timeout_s=120, wait_s=300, retries=2
    )


@pytest.fixture
def engine(config, make_policy):
    """With the policy's weights, which are not those the server was started with."""
    made = config.build(make_policy())
    made.sync(0)
    return made


def ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids for rollout in rollouts]


def student_logp(policy, rollouts: list[Rollout]) -> torch.Tensor:
    """Of the response tokens, by the Hugging Face model."""
    batch = Collator(Renderer(policy.processor), None, 512, lockstep=False)(rollouts)
    with torch.no_grad():
        logits = policy.vlm.model(**batch.student.model_inputs()).logits.flatten(0, 1)
    logp_NV = logits[batch.student.target_rows_N].log_softmax(-1)
    response_N1 = torch.tensor([[token] for r in rollouts for token in r.response_ids])
    return logp_NV.gather(-1, response_N1)[:, 0]


def served(engine, prompt: Sample, seed: int) -> tuple[list[int], torch.Tensor]:
    """Ids and their log-probs by the server, of the first rollout that `generate` would give."""
    request = chat_request(engine.policy, prompt, 1, SAMPLING, seed)
    (url,) = engine.config.urls
    request |= {"model": engine.names[url], "logprobs": True}
    reply = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=LIMIT_S, trust_env=False)
    (choice,) = reply.json()["choices"]
    logp = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
    return choice["token_ids"], logp


def test_rollouts_are_grouped_by_prompt_and_settled_by_seed(engine, processor):
    rollouts = engine.generate(PROMPTS, 3, SAMPLING, SEEDS)
    assert [r.sample.id for r in rollouts] == [p.id for p in PROMPTS for _ in range(3)]
    assert len({tuple(i) for i in ids(rollouts)}) == 15
    vocabulary = range(len(processor.tokenizer))
    assert all(token in vocabulary for response in ids(rollouts) for token in response)
    assert ids(engine.generate(PROMPTS, 3, SAMPLING, SEEDS)) == ids(rollouts)
    # Whatever else is generated with them, in whatever order.
    assert ids(engine.generate(PROMPTS[3:2:-1], 3, SAMPLING, [10])) == ids(rollouts[9:12])
    # Seeds that follow each other share nothing.
    same = engine.generate([PROMPTS[0]] * 3, 3, SAMPLING, [7, 8, 9])
    assert len({tuple(i) for i in ids(same)}) == 9
    assert ids(same[:3]) == ids(rollouts[:3])


def test_a_stop_id_ends_a_response_and_is_part_of_it(config, make_policy):
    policy = make_policy()
    policy.stop_ids = [policy.stop_ids[0], *range(20, 400, 20)]
    engine = config.build(policy)
    engine.sync(0)
    rollouts = engine.generate(PROMPTS, 4, SAMPLING, SEEDS)
    finished = [r for r in rollouts if r.finished]
    assert 5 < len(finished) < 20
    for rollout in rollouts:
        stops = [i for i, t in enumerate(rollout.response_ids) if t in policy.stop_ids]
        last = len(rollout.response_ids) - 1
        assert stops == ([last] if rollout.finished else [])
        assert rollout.finished or last + 1 == SAMPLING.max_new_tokens


def test_another_eos_of_the_served_folder_ends_nothing(config, make_policy):
    policy = make_policy()
    policy.stop_ids = [399]
    engine = config.build(policy)
    engine.sync(0)
    eos = policy.processor.tokenizer.eos_token_id
    rollouts = engine.generate(PROMPTS, 16, replace(SAMPLING, max_new_tokens=60), SEEDS)
    went_on = [r for r in rollouts if eos in r.response_ids[:-1]]
    assert went_on
    assert all(r.response_ids[-1] == 399 for r in rollouts if r.finished)


def test_forbidden_ids_are_not_sampled(config, make_policy):
    policy = make_policy()
    policy.forbidden_ids = list(range(3, 396))
    engine = config.build(policy)
    engine.sync(0)
    rollouts = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert {token for response in ids(rollouts) for token in response} <= {
        0,
        1,
        2,
        *range(396, 400),
    }


def test_greedy_rollouts_are_those_of_the_hugging_face_model(engine):
    policy = engine.policy
    greedy = engine.generate(PROMPTS, 2, replace(SAMPLING, temperature=0.0), SEEDS)
    for prompt, first, second in zip(PROMPTS, greedy[::2], greedy[1::2], strict=True):
        prompt_ids = policy.prompts([prompt])
        stops = policy.stop_ids, policy.forbidden_ids
        expected = policy.vlm.generate(prompt_ids, 24, *stops)[0].tolist()
        assert first.response_ids == second.response_ids == expected[: len(first.response_ids)]
        assert first.finished == (expected[-1] == policy.stop_ids[0])
        assert first.finished or len(first.response_ids) == 24


def test_new_weights_are_taken_over(engine):
    policy = engine.policy

    def difference() -> float:
        worst = []
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            response, logp = served(engine, prompt, seed)
            ours = student_logp(policy, [Rollout(prompt, response, True, 0)])
            worst.append((ours - logp).abs().max().item())
        return max(worst)

    assert difference() < 1e-4
    before = ids(engine.generate(PROMPTS, 1, SAMPLING, SEEDS))
    with torch.no_grad():
        for parameter in policy.vlm.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    assert difference() > 0.1
    engine.sync(1)
    assert difference() < 1e-4
    rollouts = engine.generate(PROMPTS, 1, SAMPLING, SEEDS)
    assert ids(rollouts) != before
    assert {r.policy_step for r in rollouts} == {1}
    folders = [path.name for path in (policy.folder / "rollout_weights").iterdir() if path.is_dir()]
    assert folders == ["step_000001"]


def test_weights_are_handed_over_every_so_many_steps(config, make_policy):
    policy = make_policy()
    engine = replace(config, sync_every=3).build(policy)
    held, steps = [], []
    for step in (4, 5, 6, 7, 8, 9):  # resumed at 4
        engine.sync(step)
        info = httpx.get(f"{config.urls[0]}/weight_info", trust_env=False).json()
        held.append(info["weight_version"])
        steps.append(engine.policy_step)
    assert steps == [4, 4, 6, 6, 6, 9]
    assert len(set(held)) == 3


def test_generates_in_a_thread_while_weights_change(engine):
    expected = ids(engine.generate(PROMPTS, 2, SAMPLING, SEEDS))
    found: list[Rollout] = []
    thread = threading.Thread(
        target=lambda: found.extend(engine.generate(PROMPTS, 2, SAMPLING, SEEDS))
    )
    thread.start()
    time.sleep(0.1)
    with torch.no_grad():
        for parameter in engine.policy.vlm.parameters():
            parameter.mul_(1.1)
    engine.sync(1)
    join(thread)
    assert ids(found) == expected
    assert {r.policy_step for r in found} == {0}
    assert ids(engine.generate(PROMPTS, 2, SAMPLING, SEEDS)) != expected


def test_a_policy_never_synchronised_refuses_weights_of_a_run(engine, config, make_policy):
    with pytest.raises(UserError, match="holds weights that a run has loaded into it"):
        config.build(make_policy()).generate(PROMPTS, 1, SAMPLING, SEEDS)


def test_another_run_on_the_same_server_is_not_trusted(engine, config, make_policy):
    expected = ids(engine.generate(PROMPTS, 2, SAMPLING, SEEDS))
    other = config.build(replace(make_policy(3), folder=engine.policy.folder / "other"))
    other.sync(0)
    assert ids(other.generate(PROMPTS, 2, SAMPLING, SEEDS)) != expected
    assert ids(engine.generate(PROMPTS, 2, SAMPLING, SEEDS)) == expected


def test_a_server_of_another_tokenizer_is_refused(config, make_policy):
    other = build_processor([text[::-1] for text in all_texts()], 400)
    with pytest.raises(UserError, match=r"reads a prompt of \d+ tokens where the run has \d+"):
        config.build(make_policy(processor=other))


def test_a_server_of_another_size_is_refused(config, make_policy):
    with pytest.raises(UserError, match="whose weights have other sizes than the run's model"):
        config.build(make_policy(layers=1))


def test_a_server_too_short_for_the_run_is_refused(config, make_policy):
    with pytest.raises(UserError, match="room for 512 tokens, the run needs 513"):
        config.build(replace(make_policy(), max_length=513))


def test_other_image_sizes_are_refused(engine, config, make_policy):
    other = build_processor(all_texts(), 400, min_pixels=128 * 128)
    unlike = config.build(make_policy(processor=other))
    unlike.sync(0)
    unlike.generate(PROMPTS[:1], 1, SAMPLING, [0])
    with pytest.raises(UserError, match=r"reads a prompt of \d+ tokens where the run has \d+"):
        unlike.generate(PROMPTS[:2], 1, SAMPLING, [0, 1])


def test_weights_that_cannot_be_read_end_the_run(server, engine, tmp_path):
    engine.generate(PROMPTS[:1], 1, SAMPLING, [0])
    gone = replace(engine.weights, folder=tmp_path / "rollout_weights" / "nowhere", label="lost")
    engine.weights, held = gone, engine.weights
    with pytest.raises(UserError, match=r"nowhere cannot be loaded: .*\s.*must be able to read"):
        engine.generate(PROMPTS[:1], 1, SAMPLING, [0])
    engine.weights = held  # the server is left paused, and is mended by the next loading
    assert len(engine.generate(PROMPTS, 1, SAMPLING, SEEDS)) == 5


def test_a_killed_server_is_given_the_weights_again(server, engine):
    long = replace(SAMPLING, max_new_tokens=300)
    started = time.perf_counter()
    expected = ids(engine.generate(PROMPTS, 4, long, SEEDS))
    took_s = time.perf_counter() - started
    print(f"\n{sum(map(len, expected)) / took_s:.0f} tokens/s")
    found: list[Rollout] = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(PROMPTS, 4, long, SEEDS)))
    thread.start()
    time.sleep(took_s / 3)
    assert thread.is_alive()
    server.kill()
    started = time.perf_counter()
    server.start()
    server.wait()
    print(f"up after {time.perf_counter() - started:.0f} s")
    join(thread)
    assert ids(found) == expected


def test_a_server_that_stays_away_ends_the_run(server, config, make_policy):
    """The last test: the server is dead after it."""
    engine = replace(config, wait_s=3).build(make_policy())
    engine.sync(0)
    server.kill()
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"no vLLM server was of use for 3 s: .*(?s:.*)Start it"):
        engine.generate(PROMPTS, 1, SAMPLING, SEEDS)
    assert time.perf_counter() - started < 15
    with pytest.raises(UserError, match="no vLLM server was of use"):
        engine.sync(1)
    server.start()  # for the fixture's end
