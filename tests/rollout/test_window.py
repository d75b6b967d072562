"""The generation buffer: whatever the shape, every response stays with its prompt.

The engine here spells out the prompt and the seed it was given instead of running a model: what is
tested is what becomes of prompts and responses around it.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from kd.batching.batches import FixedBatches
from kd.data import BatchStream, Split
from kd.parallel import ParallelConfig, World
from kd.rollout.engine import Sampling
from kd.rollout.generated import GeneratedSource, Generator
from kd.rollout.parts import Parts
from kd.rollout.window import Mix, Partition
from kd.types import Batch, Inputs, Rejected, Rollout, Sample, UserError

NUM_ROWS = 97


class Rows:
    """Rows with an id and an answer; every `bad`-th is unreadable."""

    def __init__(self, bad: int = 0) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> Sample | Rejected:
        if self.bad and index % self.bad == 0:
            return Rejected(str(index), "unreadable", broken=True)
        return Sample(str(index), [{"role": "user", "content": str(index)}], [], f"a{index}")


class Spelling:
    """Responds with [id of the prompt, generation, seed]; notes its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.synced: list[int] = []

    def sync(self, step: int) -> None:
        self.synced.append(step)

    def generate(self, prompts, n, sampling, seeds):
        self.calls.append(len(prompts))
        assert len(seeds) == len(prompts)
        step = self.synced[-1] if self.synced else 0
        return [
            Rollout(sample, [int(sample.id), k, seed], True, step)
            for sample, seed in zip(prompts, seeds, strict=True)
            for k in range(n)
        ]

    def close(self) -> None:
        pass


class Collate:
    """Keeps rows as they are: nothing here is about tensors."""

    def __call__(self, rows) -> Batch:
        none = torch.empty(0, dtype=torch.int64)
        rollouts = [
            row if isinstance(row, Rollout) else Rollout(row, [], True, 0, "dataset")
            for row in rows
        ]
        inputs = Inputs(none, none, none, {})
        return Batch(inputs, inputs, none, none, rollouts)

    def render(self, rows):
        return rows

    def screen(self, rows, response_tokens):
        return (
            [row for row in rows if isinstance(row, Sample)],
            [row for row in rows if isinstance(row, Rejected)],
        )


@pytest.fixture(autouse=True, scope="module")
def _process_group():
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield
    world.close()


class OneOf(World):
    """A rank of several whose collectives see this rank alone: they run one after the other."""

    def sum_ints(self, *values: int) -> list[int]:
        return list(values)

    def gather(self, value):
        return [value]

    def agree(self, problem: str | None) -> None:
        if problem:
            raise UserError(problem)


def source(
    partition: Partition, mix: Mix, rank: int = 0, ranks: int = 1, bad: int = 0, ahead: bool = False
) -> GeneratedSource:
    world = OneOf(init_device_mesh("cpu", (1,)), torch.device("cpu"), rank, ranks)

    def stream(collate, size):
        return BatchStream(Rows(bad), collate, Split(size, rank, ranks), seed=3)

    sizes = partition.micro_batch_size, partition.grad_accum
    nobody = None, None, None  # no student's policy, no teacher's, nobody who is told ahead
    batching = FixedBatches(Collate(), *sizes)  # type: ignore[arg-type]
    parts = Parts(stream, Collate(), batching, *nobody, *sizes, 3, "drop", world)  # type: ignore[arg-type]
    n = partition.num_generations
    generators = {
        "student": Generator(Spelling(), n, Sampling(), True),
        "teacher": Generator(Spelling(), n, Sampling(), False),
    }
    return GeneratedSource(parts, partition, mix, generators, ahead)


def check_step(batches: list[Batch], partition: Partition) -> None:
    """Every response belongs to its prompt, and the rollouts of a prompt are all there, once."""
    rollouts = [rollout for batch in batches for rollout in batch.rollouts]
    generated = [rollout for rollout in rollouts if rollout.policy != "dataset"]
    assert all(rollout.response_ids[0] == int(rollout.sample.id) for rollout in generated)
    of_prompt = Counter((rollout.response_ids[2], rollout.sample.id) for rollout in generated)
    assert set(of_prompt.values()) <= {partition.num_generations}
    assert len({tuple(rollout.response_ids) for rollout in generated}) == len(generated)


@st.composite
def partitions(draw) -> Partition:
    micro, accum = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    divisors = [n for n in range(1, micro * accum + 1) if micro * accum % n == 0]
    return Partition(micro, accum, draw(st.sampled_from(divisors)), draw(st.integers(1, 3)))


@settings(max_examples=60, deadline=None)
@given(
    partition=partitions(),
    lmbda=st.sampled_from([0.0, 0.3, 1.0]),
    off_policy=st.sampled_from(["dataset", "teacher"]),
    bad=st.sampled_from([0, 5]),
)
def test_every_response_stays_with_its_prompt(partition, lmbda, off_policy, bad):
    src = source(partition, Mix(3, lmbda, off_policy), bad=bad)
    seen: Counter[str] = Counter()
    num_rows = 0
    for _ in range(2 * partition.window_steps):
        batches = src.take()
        assert len(batches) == partition.grad_accum
        for batch in batches:
            assert len(batch.rollouts) <= partition.micro_batch_size
            policies = {rollout.policy for rollout in batch.rollouts}
            assert len(policies) <= 1, "a micro-batch is one slice's"
            num_rows += len(batch.rollouts)
        check_step(batches, partition)
        seen.update(rollout.policy for batch in batches for rollout in batch.rollouts)
    if not bad:
        assert num_rows == 2 * partition.window_steps * partition.rows
    if lmbda in (0, 1):
        assert set(seen) == {off_policy if lmbda == 0 else "student"}
    calls = [generator.engine.calls for generator in src.generators.values()]
    assert all(len(of_engine) <= 2 for of_engine in calls), "one call per window and engine"


@settings(max_examples=40, deadline=None)
@given(
    partition=partitions(),
    lmbda=st.sampled_from([0.0, 0.4, 1.0]),
    done=st.integers(0, 4),
    bad=st.sampled_from([0, 5]),
    ahead=st.booleans(),
)
def test_an_interrupted_window_goes_on(partition, lmbda, done, bad, ahead):
    mix = Mix(3, lmbda)
    whole = source(partition, mix, bad=bad, ahead=ahead)
    steps = [take(whole) for _ in range(6)]
    first = source(partition, mix, bad=bad, ahead=ahead)
    assert [take(first) for _ in range(done)] == steps[:done]
    state = json.loads(json.dumps(first.state_dict()))
    # To save is not to change anything.
    assert take(first) == steps[done]
    again = source(partition, mix, bad=bad, ahead=ahead)
    again.load_state_dict(state)
    assert [take(again) for _ in range(done, 6)] == steps[done:]
    assert again.state_dict() == source_after(partition, mix, bad, ahead).state_dict()


def source_after(partition, mix, bad, ahead) -> GeneratedSource:
    src = source(partition, mix, bad=bad, ahead=ahead)
    for _ in range(6):
        take(src)
    return src


def take(src: GeneratedSource) -> list[list[tuple]]:
    return [
        [(r.sample.id, tuple(r.response_ids), r.policy, r.policy_step) for r in batch.rollouts]
        for batch in src.take()
    ]


def joined(ranks) -> list[tuple]:
    return [row for rank in ranks for batch in rank for row in batch]


@settings(max_examples=30, deadline=None)
@given(partition=partitions(), ranks=st.integers(2, 3))
def test_the_same_rollouts_on_any_number_of_ranks(partition, ranks):
    """Ranks, micro-batch and accumulation split up the same rows of a step."""
    mix = Mix(3, 1.0)
    sources = [source(partition, mix, rank, ranks) for rank in range(ranks)]
    n = partition.num_generations
    alone = source(Partition(partition.rows * ranks, 1, n, partition.window_steps), mix)
    for _ in range(3):
        assert sorted(joined(take(src) for src in sources)) == sorted(joined([take(alone)]))


def test_a_window_under_way_moves_to_another_number_of_ranks():
    mix = Mix(3, 1.0)
    two = [source(Partition(2, 3, 2, 3), mix, rank, 2) for rank in range(2)]
    for src in two:
        take(src)
    states = [src.state_dict() for src in two]
    pending = [group for state in states for group in state["pending"]]
    merged = states[0] | {"pending": sorted(pending, key=lambda group: group["number"])}
    one = source(Partition(12, 1, 2, 3), mix)
    one.load_state_dict(json.loads(json.dumps(merged)))
    for _ in range(4):  # the two steps that are left, and two of the next window
        assert sorted(joined(take(src) for src in two)) == sorted(joined([take(one)]))
    with pytest.raises(UserError, match=r"middle of a window, with 12 prompts left: not whole"):
        source(Partition(5, 1, 1, 3), mix).load_state_dict(merged)


def test_generation_for_a_window_is_one_call_and_synchronises_once():
    src = source(Partition(2, 4, 4, 2), Mix(3, 1.0))
    for _ in range(4):
        take(src)
    engine = src.generators["student"].engine
    assert isinstance(engine, Spelling)
    assert engine.calls == [4, 4] and engine.synced == [0, 2]


def test_ahead_the_next_window_has_the_weights_before_this_one():
    src = source(Partition(2, 2, 1, 1), Mix(3, 1.0), ahead=True)
    policy_steps = [{row[3] for row in joined([take(src)])} for _ in range(4)]
    assert policy_steps == [{0}, {0}, {1}, {2}]


def test_a_schedule_goes_in_a_straight_line_and_stays():
    mix = Mix(0, 1.0, "dataset", lmbda_end=0.2, lmbda_steps=4)
    assert [mix.probability(step) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.6, 0.2, 0.2])
    drawn = [Mix(s, 0.3).draw(7, 100).count("student") for s in range(50)]
    assert sum(drawn) / 5000 == pytest.approx(0.3, abs=0.03)
    assert len(set(drawn)) > 5


def test_an_epoch_without_a_usable_prompt_stops():
    src = source(Partition(4, 2, 1, 1), Mix(3, 1.0), bad=1)
    with pytest.raises(UserError, match=r"a whole epoch, could be used.*unreadable"):
        for _ in range(NUM_ROWS):
            take(src)
