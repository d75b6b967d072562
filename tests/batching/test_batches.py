"""The micro-batches of a step: the same rows, whatever the budget and the number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

from kd.batching import FixedBatching, PackedBatching, TokenBudgetBatching
from kd.data import BatchStream, Collator, Renderer, Split
from kd.data.digits import all_texts
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig, World
from kd.types import Batch, Rejected, Sample, UserError
from tests.processes import LIMIT_S

BUDGET = 120


class Rows:
    """Questions of any length about no, one or two images, the first of them long."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Sample | Rejected:
        images = [Image.new("RGB", (64 + 64 * (index % 2), 64))] * (index % 3)
        text = "What is it? " * (6 if index < 4 else 1 + index % 2)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        return Sample(f"{index}", [{"role": "user", "content": content}], images, "It is odd.")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield world
    world.close()


def collator(lockstep: bool = False, max_length: int = BUDGET) -> Collator:
    return Collator(Renderer(build_processor(all_texts())), None, max_length, lockstep)


class Together(World):
    """One of several ranks in threads of this process, which wait for each other."""

    def gather(self, value: Any) -> list[Any]:
        VALUES[self.rank] = value
        BARRIER.wait(LIMIT_S)
        values = [VALUES[rank] for rank in range(self.size)]
        BARRIER.wait(LIMIT_S)
        return values


VALUES: dict[int, Any] = {}
BARRIER = threading.Barrier(2)


def rank_of_two(rank: int) -> Together:
    return Together(init_device_mesh("cpu", (1,)), torch.device("cpu"), rank, 2)


def steps_of(batching: Any, stream: BatchStream, steps: int) -> list[list[Batch]]:
    return [batching.take(stream) for _ in range(steps)]


def stream_of(rows: Any, batching: Any, rank: int, ranks: int) -> BatchStream:
    split = Split(batching.rows_at_a_time, rank, ranks)
    return BatchStream(rows, batching.prepare, split, seed=0, shuffle=False)


def ids(batches: list[Batch]) -> list[str]:
    return sorted(sample.id for batch in batches for sample in batch.samples)


@pytest.mark.parametrize("option", [TokenBudgetBatching, PackedBatching])
def test_a_step_has_the_same_rows_however_divided(world, option):
    fixed = FixedBatching().build(collator(), 2, 4, world)
    budget = option(max_tokens=BUDGET).build(collator(), 2, 4, world)
    ours, theirs = (steps_of(b, stream_of(Rows(), b, 0, 1), 3) for b in (budget, fixed))
    assert [ids(step) for step in ours] == [ids(step) for step in theirs]
    for step, same in zip(ours, theirs, strict=True):
        assert all(batch.num_places <= BUDGET for batch in step)
        assert sum(b.num_tokens for b in step) == sum(b.num_tokens for b in same)
        assert sum(b.num_targets for b in step) == sum(b.num_targets for b in same)
        tokens = sum(b.num_tokens for b in step)
        places, fixed_places = (sum(b.num_places for b in s) for s in (step, same))
        assert tokens <= places < fixed_places
        assert (tokens == places) == (option is PackedBatching)


@pytest.mark.parametrize("option", [TokenBudgetBatching, PackedBatching])
def test_two_ranks_share_the_rows_of_one_evenly(world, option):
    alone = option(max_tokens=BUDGET).build(collator(), 1, 8, world)
    expected = [ids(step) for step in steps_of(alone, stream_of(Rows(), alone, 0, 1), 2)]

    def run(rank: int) -> list[list[Batch]]:
        batching = option(max_tokens=BUDGET).build(collator(lockstep=True), 1, 4, rank_of_two(rank))
        return steps_of(batching, stream_of(Rows(), batching, rank, 2), 2)

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(run, range(2)))
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        assert sorted(ids(first) + ids(second)) == expected[step]
        assert len(first) == len(second), "as many forwards on every rank"
        tokens = [sum(batch.num_tokens for batch in batches) for batches in (first, second)]
        # Rank 0 has the four long rows of the first step: one of them has moved.
        assert max(tokens) < 1.15 * min(tokens)
        for batch in (*first, *second):
            assert "pixel_values" in batch.student.media, "every rank runs its vision tower"


def test_a_row_that_moves_must_be_there(world):
    class Elsewhere(Rows):
        """Rank 1 cannot read what rank 0 can."""

        def __getitem__(self, index: int) -> Sample | Rejected:
            if threading.current_thread().name.endswith("_1") and index < 4:
                return Rejected(f"{index}", "no such file", broken=True)
            return super().__getitem__(index)

    def run(rank: int) -> list[list[Batch]]:
        threading.current_thread().name = f"rank_{rank}"
        batching = TokenBudgetBatching(BUDGET).build(
            collator(lockstep=True), 1, 4, rank_of_two(rank)
        )
        return steps_of(batching, stream_of(Elsewhere(), batching, rank, 2), 1)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(run, rank) for rank in range(2))
        first.result(LIMIT_S)
        with pytest.raises(UserError, match="read by one rank and is refused on another: no such"):
            second.result(LIMIT_S)


def test_rejected_rows_are_told_of_and_an_empty_step_is_a_batch(world):
    budget = TokenBudgetBatching(20).build(collator(max_length=20), 1, 4, world)
    (batch,) = budget.take(stream_of(Rows(), budget, 0, 1))
    assert [row.id for row in batch.rejected] == ["0", "1", "2", "3"]
    assert (batch.samples, batch.num_tokens, batch.num_targets) == ([], 0, 0)


def test_the_stream_goes_on_after_any_step(world):
    budget = PackedBatching(BUDGET).build(collator(), 1, 6, world)
    stream = stream_of(Rows(), budget, 0, 1)
    whole = [ids(step) for step in steps_of(budget, stream, 4)]
    again = stream_of(Rows(), budget, 0, 1)
    again.seek(12)
    assert [ids(step) for step in steps_of(budget, again, 2)] == whole[2:]


def test_vision_tokens_count_as_the_processor_expands_them():
    collate = collator(max_length=1000)
    (row,) = collate.prepare([Rows()[14]])
    assert not isinstance(row, Rejected) and row.has_image
    batch = collate.batch([row])
    assert row.length == batch.num_tokens == batch.num_places
    # Two images of 64 x 64, each 4 x 4 patches of 16, merged 2 x 2.
    assert int((batch.student.input_ids_BS == collate.student.processor.image_token_id).sum()) == 8
    # Where the teacher reads larger images, its rendering is what a row costs.
    sharp = Renderer(build_processor(all_texts(), min_pixels=128 * 128))
    (both,) = Collator(collate.student, sharp, 1000, False).prepare([Rows()[14]])
    assert not isinstance(both, Rejected)
    assert (both.num_tokens, both.length) == (row.length, row.length + 2 * (16 - 4))


def test_packed_rows_are_those_of_a_padded_batch():
    collate = collator(max_length=1000)
    rows = collate.prepare([Rows()[i] for i in (1, 3, 5)])
    packed, padded = collate.batch(rows, packed=True), collate.batch(rows)
    lengths = packed.student.lengths
    assert lengths == padded.student.attention_mask_BS.sum(1).tolist()
    kept = padded.student.attention_mask_BS.bool()
    assert torch.equal(packed.student.input_ids_BS[0], padded.student.input_ids_BS[kept])
    assert torch.equal(packed.labels_BS[0], padded.labels_BS[kept])
    assert torch.equal(packed.labels_N, padded.labels_N)
    types = "mm_token_type_ids"
    assert torch.equal(packed.student.media[types][0], padded.student.media[types][kept])
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(packed.student.media[name], padded.student.media[name])
    predicted = packed.student.input_ids_BS[0][packed.student.target_rows_N + 1]
    assert torch.equal(predicted, packed.labels_N)
    assert "attention_mask" not in packed.student.model_inputs()
