"""What goes to a GPU is copied out of pinned memory, and all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kd.align import Alignment, Groups
from kd.batching import FixedBatching, PackedBatching, TokenBudgetBatching
from kd.data import Collator, Renderer
from kd.data.digits import all_texts
from kd.data.stream import _Packet
from kd.dflash import BlockMaker
from kd.model import left_to_the_forward
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig, World
from kd.types import Batch, Inputs, Rollout
from tests.batching.test_batches import BUDGET, Rows, stream_of

BATCHINGS = {
    "fixed": FixedBatching(),
    "token_budget": TokenBudgetBatching(BUDGET),
    "packed": PackedBatching(BUDGET),
}


class FakeGpu(TorchFunctionMode):
    """In place of CUDA, which a CPU has not: notes what is pinned and what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.copied: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.pin_memory:
            (x,) = args
            if not any(x is other for other in self.pinned):
                self.pinned.append(x := x.clone())
            return x
        if func is Tensor.to and "cuda" in map(str, args):
            assert kwargs == {"non_blocking": True}
            assert any(args[0] is x for x in self.pinned), "the host would wait"
            self.copied.append(args[0])
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def world() -> Iterator[World]:
    made = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield made
    made.close()


def count_up(inputs: Inputs) -> Tensor:
    return torch.arange(inputs.input_ids_BS.shape[1])[None]


@pytest.fixture(scope="module")
def collate() -> Collator:
    """Both sides have a rendering and positions of their own."""
    sides = (Renderer(build_processor(all_texts(), min_pixels=n * n)) for n in (32, 128))
    return Collator(*sides, 2 * BUDGET, lockstep=True, positions=(count_up, count_up))


def tensors(x: Any) -> list[Tensor]:
    """All there are in an object of dataclasses."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for value in x.values() for t in tensors(value)]
    if isinstance(x, (Batch, Inputs, Groups)) or type(x).__name__ == "Side":
        return [t for f in dataclasses.fields(x) for t in tensors(getattr(x, f.name))]
    return []


def check(batch: Batch) -> None:
    """Every tensor of it comes to the GPU, once, and out of pinned memory."""
    with FakeGpu() as gpu:
        there = batch.to("cuda")
    found = tensors(there)
    assert len(found) == len(tensors(batch)) >= 15
    assert {id(x) for x in found} == {id(x) for x in gpu.copied}
    assert len(gpu.copied) == len({id(x) for x in tensors(batch)})


@pytest.mark.parametrize("batching", BATCHINGS)
def test_batches_of_the_data_set(collate, world, batching):
    made = BATCHINGS[batching].build(collate, 2, 3, world)
    for batch in made.take(stream_of(Rows(), made, 0, 1)):
        check(batch)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_batches_of_rollouts(collate, world, batching):
    rollouts = [Rollout(Rows()[i], [5, 6, 7 + i], True, 0) for i in range(6)]
    for batch in BATCHINGS[batching].build(collate, 2, 3, world).divide(rollouts):
        check(batch)


def test_batches_of_two_tokenizers(collate):
    batch = collate([Rows()[1], Rows()[2]])
    ids = [rollout.response_ids for rollout in batch.rollouts]
    groups = Groups.join(ids, ids, [Alignment([(0, 1, 0, 1)]) for _ in ids])
    assert len(tensors(groups)) == 8
    check(dataclasses.replace(batch, groups=groups))


def test_blocks_of_a_draft(collate):
    blocks = BlockMaker(4, 999, None)(collate([Rows()[1]]))
    with FakeGpu() as gpu:
        blocks.to("cuda")
    assert len(gpu.copied) == sum(isinstance(x, Tensor) for x in vars(blocks).values()) == 8


def test_what_a_loader_has_pinned_is_not_pinned_again(collate):
    with FakeGpu() as gpu:
        packet = _Packet(collate([Rows()[1], Rows()[2]])).pin_memory()
        pinned = len(gpu.pinned)
        packet.content.to("cuda")
    assert len(gpu.pinned) == len(gpu.copied) == pinned > 15


def test_sides_that_differ_in_positions_alone_share_the_rest(collate):
    sides = collate.student, None, 2 * BUDGET, False, None
    batch = Collator(*sides, (count_up, left_to_the_forward))([Rows()[1]])
    with FakeGpu() as gpu:
        there = batch.to("cuda")
    assert there.teacher.media["pixel_values"] is there.student.media["pixel_values"]
    assert there.teacher.position_ids is None and there.student.position_ids is not None
    assert len(gpu.copied) == len({id(x) for x in tensors(batch)})


def test_on_a_cpu_nothing_is_copied(collate):
    batch = collate([Rows()[1]])
    assert [id(x) for x in tensors(batch.to("cpu"))] == [id(x) for x in tensors(batch)]
