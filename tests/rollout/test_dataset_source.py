from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

from kd.batching import FixedBatching
from kd.data import BatchStream, Collator, DigitsConfig, Renderer, Split
from kd.data.digits import all_texts
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig, World
from kd.rollout import DatasetSource
from kd.types import Batch, Rejected, Sample, UserError

GOOD, BROKEN, LONG = "good", "broken", "long"


@dataclass
class Rows:
    """A data set with a usable, a broken or a too long row at every place."""

    outcomes: list[str]

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, index: int) -> Sample | Rejected:
        outcome = self.outcomes[index]
        if outcome == BROKEN:
            return Rejected(f"row {index}", "image a.png cannot be read", broken=True)
        messages = [{"role": "user", "content": [{"type": "image"}]}]
        answer = "odd " * 300 if outcome == LONG else "It is odd."
        return Sample(f"row {index}", messages, [Image.new("RGB", (64, 64))], answer)


@pytest.fixture(scope="module")
def collator() -> Collator:
    return Collator(Renderer(build_processor(all_texts())), None, 256, lockstep=False)


@pytest.fixture(autouse=True, scope="module")
def _process_group():
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield
    world.close()


def source(rows, collator, policy="raise", split=Split(2), num_workers=0, seed=0) -> DatasetSource:  # noqa: B008
    stream = BatchStream(rows, collator, split, seed=seed, shuffle=False, num_workers=num_workers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    world = World(mesh, torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    batching = FixedBatching().build(collator, split.micro_batch_size, 1, world)
    return DatasetSource(stream, batching, policy, world)


def take(src: DatasetSource, steps: int) -> list[Batch]:
    """The batches of so many steps, one each."""
    return [batch for _ in range(steps) for batch in src.take()]


def taken(batches) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in batches]


def test_takes_rows_in_order_and_counts_those_dropped(collator, caplog):
    rows = Rows([GOOD, BROKEN, LONG, GOOD, LONG, LONG, GOOD, GOOD])
    src = source(rows, collator, "drop")
    with caplog.at_level(logging.WARNING):
        read = taken(take(src, 4))
    assert read == [["row 0"], ["row 3"], [], ["row 6", "row 7"]]
    assert src.rejections.counters == {"dropped_too_long": 3, "dropped_broken": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Row row 1 is dropped: image a.png cannot be read"
    assert lines[1].startswith("Row row 2 is dropped: ")
    assert len(lines) == 4


def test_only_the_first_dropped_rows_are_named(collator, caplog):
    with caplog.at_level(logging.WARNING):
        src = source(Rows([GOOD] + [BROKEN] * 9), collator, "drop")
        take(src, 5)
    assert src.rejections.counters["dropped_broken"] == 9
    assert len(caplog.records) == 6
    assert "counted, not named" in caplog.records[-1].getMessage()


def test_broken_row_stops_with_its_id_and_reason(collator):
    src = source(Rows([GOOD, GOOD, GOOD, BROKEN]), collator)
    take(src, 1)
    with pytest.raises(UserError, match=r"Row row 3 is broken: image a\.png cannot be read\."):
        take(src, 1)


def test_too_long_row_does_not_stop(collator):
    src = source(Rows([GOOD, LONG]), collator)
    assert taken(take(src, 1)) == [["row 0"]]
    assert src.rejections.counters["dropped_too_long"] == 1


def test_epoch_without_a_usable_row_stops_with_reasons(collator):
    src = source(Rows([LONG, BROKEN, LONG, LONG]), collator, "drop")
    take(src, 1)
    with pytest.raises(UserError, match=r"row 0: .*max_length 256 .*; row 1: image a\.png"):
        take(src, 1)


def test_a_thousand_rows_without_a_usable_one_are_enough(collator):
    """Of many more: each batch of them would be a step that trains on nothing."""
    rows = Rows([GOOD] * 4 + [BROKEN] * 2000)
    src = source(rows, collator, "drop", split=Split(4))
    take(src, 250)
    with pytest.raises(UserError, match=r"^None of 1000 rows in succession could be used\. The f"):
        take(src, 1)


def test_few_usable_rows_do_not_stop(collator):
    src = source(Rows([BROKEN] * 7 + [GOOD]), collator, "drop")
    assert sum(len(batch.samples) for batch in take(src, 12)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_goes_on_with_the_next_row(collator, num_workers):
    rows = DigitsConfig(num_images=6).build("train")
    whole = taken(take(source(rows, collator, split=Split(3)), 6))
    src = source(rows, collator, split=Split(3), num_workers=num_workers)
    assert taken(take(src, 2)) == whole[:2]
    state = src.state_dict()
    assert state == {"position": 6, "dropped_too_long": 0, "dropped_broken": 0}
    ranks = [source(rows, collator, split=Split(3, rank, world=2)) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    steps = zip(*(taken(take(rank, 2)) for rank in ranks), strict=True)
    assert [rows for step in steps for rows in step] == whole[2:]


def test_resume_restores_the_counts(collator):
    rows = Rows([GOOD, BROKEN, LONG, GOOD])
    src = source(rows, collator, "drop")
    take(src, 2)
    again = source(rows, collator, "drop")
    again.load_state_dict(src.state_dict())
    take(again, 1)
    assert again.state_dict() == {"position": 6, "dropped_too_long": 1, "dropped_broken": 2}


def test_loading_a_state_forgets_rows_read_before(collator):
    rows = DigitsConfig(num_images=6).build("train")
    src = source(rows, collator)
    first = taken(take(src, 3))
    src.load_state_dict({"position": 2, "dropped_too_long": 0, "dropped_broken": 0})
    assert taken(take(src, 2)) == first[1:]


def rank_of_two(rank: int, folder: Path) -> None:
    """On rank 0 every row is usable, on rank 1 every other one is too long."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    collate = Collator(Renderer(build_processor(all_texts())), None, 256, lockstep=True)
    rows = Rows([GOOD, GOOD, GOOD, LONG] * 2)
    src = source(rows, collate, split=Split(2, rank, world=2))
    take(src, 2)
    assert src.rejections.counters["dropped_too_long"] == 2 * rank
    state = src.state_dict()
    assert state == {"position": 8, "dropped_too_long": 2, "dropped_broken": 0}
    src.load_state_dict(state)
    assert src.state_dict() == state
    take(src, 1)
    assert src.state_dict() == {"position": 12, "dropped_too_long": 3, "dropped_broken": 0}
    dist.destroy_process_group()


def test_state_is_the_same_on_every_rank_and_counts_all(tmp_path):
    # The server that starts the stream's workers has the imports behind it already.
    mp.start_processes(rank_of_two, (tmp_path,), nprocs=2, start_method="forkserver")
