"""Which rows are read where: the same ones, however the work is split up, stopped and resumed."""

from __future__ import annotations

import itertools

import pytest
import torch

from kd.data import (
    BatchStream,
    Collator,
    DigitsConfig,
    Renderer,
    Split,
    validation_batches,
)
from kd.types import UserError


def as_rows(rows):
    return rows


ROWS = DigitsConfig(pool="student", num_images=9, kinds=["which", "parity", "next"])  # 27 rows


def stream(split: Split, *, seed: int = 0, shuffle: bool = True, num_workers: int = 0):
    return BatchStream(
        ROWS.build("train"), as_rows, split, seed=seed, shuffle=shuffle, num_workers=num_workers
    )


def ids(batches) -> list[str]:
    return [row.id for batch in batches for row in batch]


def read_steps(world: int, accum: int, size: int, steps: int, position: int = 0) -> list[set[str]]:
    """Per optimizer step, the rows that all ranks read together."""
    streams = [stream(Split(size, rank, world)) for rank in range(world)]
    for s in streams:
        s.seek(position)
    read = []
    for _ in range(steps):
        rows = [ids(itertools.islice(s, accum)) for s in streams]
        assert sum(map(len, rows)) == world * accum * size
        read.append({row for of_rank in rows for row in of_rank})
    assert {s.position for s in streams} == {position + steps * world * accum * size}
    return read


@pytest.mark.parametrize(
    ("world", "accum", "size"), [(1, 4, 3), (2, 2, 3), (4, 1, 3), (2, 6, 1), (3, 2, 2), (1, 1, 12)]
)
def test_step_reads_the_same_rows_for_any_split(world, accum, size):
    # 12 rows a step from 27: steps 3 and 5 straddle epochs.
    assert read_steps(world, accum, size, steps=6) == read_steps(1, 12, 1, steps=6)


def test_epoch_has_every_row_once_in_an_order_of_its_own():
    read = ids(itertools.islice(stream(Split(1)), 81))
    epochs = [read[:27], read[27:54], read[54:]]
    everything = {ROWS.build("train")[i].id for i in range(27)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seed_decides_the_order():
    first, again, other = (ids(itertools.islice(stream(Split(4), seed=s), 5)) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_without_shuffle_rows_come_in_order():
    rows = ROWS.build("train")
    read = ids(itertools.islice(stream(Split(4), shuffle=False), 7))
    assert read == [rows[i % 27].id for i in range(28)]


def test_micro_batch_larger_than_the_data_goes_round():
    assert len(set(ids(itertools.islice(stream(Split(60)), 1)))) == 27


@pytest.mark.parametrize(("world", "accum", "size"), [(1, 4, 3), (2, 3, 2), (4, 3, 1)])
def test_resumes_on_any_world_size(world, accum, size):
    whole = read_steps(1, 12, 1, steps=5)
    assert read_steps(world, accum, size, steps=3, position=24) == whole[2:]


def test_workers_change_nothing_and_rows_read_ahead_do_not_count(processor):
    collate = Collator(Renderer(processor), None, 256, lockstep=False)
    rows = ROWS.build("train")
    plain, ahead, resumed = (
        BatchStream(rows, collate, Split(4), seed=0, num_workers=n) for n in (0, 2, 2)
    )
    state = torch.get_rng_state()
    expected, got = list(itertools.islice(plain, 6)), list(itertools.islice(ahead, 3))
    assert ahead.position == 12
    resumed.seek(ahead.position)
    got += list(itertools.islice(resumed, 3))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(expected, got, strict=True):
        assert [s.id for s in a.samples] == [s.id for s in b.samples]
        assert torch.equal(a.student.input_ids_BS, b.student.input_ids_BS)
        assert torch.equal(a.student.media["pixel_values"], b.student.media["pixel_values"])
        assert b.teacher is b.student


def test_seek_starts_anew():
    s = stream(Split(4))
    first = ids(itertools.islice(s, 3))
    s.seek(4)
    assert ids(itertools.islice(s, 2)) == first[4:]


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (4, 4), (4, 8), (3, 1)])
def test_validation_reads_every_row_once_in_equally_many_batches(world, size):
    rows = DigitsConfig(val_samples=21).build("validation")
    ranks = [list(validation_batches(rows, as_rows, Split(size, r, world))) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    read = sorted(itertools.chain.from_iterable(ids(batches) for batches in ranks))
    assert read == sorted(rows[i].id for i in range(21))


def test_validation_batch_without_rows_keeps_the_ranks_in_step(processor):
    rows = DigitsConfig(val_samples=3).build("validation")
    collate = Collator(Renderer(processor), None, 256, lockstep=True)
    first, second = (list(validation_batches(rows, collate, Split(4, r, 2))) for r in range(2))
    assert [len(b.samples) for b in first + second] == [3, 0]
    assert second[0].student.media["image_grid_thw"].shape == (1, 3)


def test_no_rows_is_the_users_mistake():
    with pytest.raises(UserError, match="no rows"):
        BatchStream([], as_rows, Split(4), seed=0)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_pinned(processor, sharp_processor, num_workers):
    collate = Collator(Renderer(processor), Renderer(sharp_processor), 256, lockstep=False)
    batch = next(
        BatchStream(
            ROWS.build("train"),
            collate,
            Split(4),
            seed=0,
            num_workers=num_workers,
            pin_memory=True,
        )
    )
    tensors = [batch.labels_BS, batch.labels_N]
    for inputs in (batch.student, batch.teacher):
        tensors += [*inputs.model_inputs().values(), inputs.target_rows_N]
    assert all(tensor.is_pinned() for tensor in tensors)
