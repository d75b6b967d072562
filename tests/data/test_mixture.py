"""Rows drawn from several data sets: in which shares, in which order, and told apart."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from kd.data import (
    BatchStream,
    ConversationsConfig,
    DataConfig,
    DigitsConfig,
    MixtureConfig,
    Split,
    validation_batches,
)
from kd.data.mixture import BLOCK, MixedOrder, MixedRows, order_of
from kd.types import UserError

NAMES = ("few", "many", "none")
SIZES = {"few": 14, "many": 40, "none": 9}


def mixture(**settings) -> MixtureConfig:
    parts: dict[str, DataConfig] = {
        "many": DigitsConfig(num_images=20, kinds=["which", "parity"], val_samples=11),
        "few": DigitsConfig(num_images=7, kinds=["which", "recite"], val_samples=5),
        "none": DigitsConfig(num_images=9, kinds=["next"], val_samples=3),
    }
    weights = {"few": 3.0, "many": 1.0, "none": 0.0}
    return MixtureConfig(**{"datasets": parts, "weights": weights, **settings})


def built(split: str = "train", **settings) -> MixedRows:
    rows = mixture(**settings).build(split)
    assert isinstance(rows, MixedRows)
    return rows


def as_rows(rows):
    return rows


def stream(split: Split, *, seed: int = 0, rows: MixedRows | None = None) -> BatchStream:
    return BatchStream(rows or built(), as_rows, split, seed=seed)


def ids(batches) -> list[str]:
    return [row.id for batch in batches for row in batch]


def slots(first: int, last: int, *, seed: int = 0, shuffle: bool = True) -> list[int]:
    order = order_of(built(), seed, shuffle)
    return [order.row(slot) for slot in range(first, last)]


def test_shares_are_the_weights_and_the_metrics_say_so():
    last = 3 * BLOCK + 17
    read = slots(0, last)
    few = sum(row < SIZES["few"] for row in read)
    assert abs(few / last - 0.75) < 4 * math.sqrt(0.75 * 0.25 / last)
    order = order_of(built(), 0, True)
    assert order.metrics(last) == {
        "data/share_few": few / last,
        "data/share_many": 1 - few / last,
        "data/epochs_few": few / SIZES["few"],
        "data/epochs_many": (last - few) / SIZES["many"],
    }
    assert set(order.metrics(0).values()) == {0}


def test_each_data_set_is_read_in_epochs_with_orders_of_their_own():
    read = slots(0, 1000)
    for first, size in ((0, SIZES["few"]), (SIZES["few"], SIZES["many"])):
        mine = [row - first for row in read if 0 <= row - first < size]
        epochs = [tuple(mine[i : i + size]) for i in range(0, len(mine) - size + 1, size)]
        assert len(epochs) > 4
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs)


def test_data_sets_of_one_size_have_different_orders():
    part = DigitsConfig(num_images=20, kinds=["which"])
    rows = built(datasets={"a": part, "b": part}, weights={"a": 1, "b": 1})
    read = np.array([order_of(rows, 0, True).row(slot) for slot in range(100)])
    assert read[read < 20][:20].tolist() != (read[read >= 20] - 20)[:20].tolist()


def test_a_data_set_may_keep_its_order():
    parts = mixture().datasets
    parts["many"].shuffle = False
    order = order_of(built(datasets=parts), 0, True)
    read = [order.row(slot) for slot in range(300)]
    many = [row - SIZES["few"] for row in read if row >= SIZES["few"]]
    assert many == [i % SIZES["many"] for i in range(len(many))]
    few = [row for row in read if row < SIZES["few"]]
    assert few[: SIZES["few"]] != list(range(SIZES["few"]))


def test_seed_decides():
    assert slots(0, 60) == slots(0, 60)
    assert slots(0, 60) != slots(0, 60, seed=1)
    assert slots(0, 60, shuffle=False) != slots(0, 60)


def test_any_slot_can_be_asked_for_at_any_time():
    last = 2 * BLOCK + 50
    read = slots(0, last)
    order = order_of(built(), 0, True)
    some = np.random.default_rng(0).permutation(last)[:40].tolist()
    assert [order.row(slot) for slot in some] == [read[slot] for slot in some]


def read_steps(world: int, accum: int, size: int, steps: int, position: int) -> list[list[str]]:
    """Per optimizer step, the rows that all ranks read together, in the order of the slots."""
    rows = built()
    streams = [stream(Split(size, rank, world), rows=rows) for rank in range(world)]
    for s in streams:
        s.seek(position)
    read = [
        ids(next(s) for _ in range(accum) for s in streams)  # ranks within a micro-step
        for _ in range(steps)
    ]
    assert {s.position for s in streams} == {position + steps * world * accum * size}
    assert len({tuple(s.metrics().items()) for s in streams}) == 1
    return read


@pytest.mark.parametrize(("world", "accum", "size"), [(1, 4, 3), (2, 2, 3), (2, 6, 1), (3, 1, 4)])
def test_step_reads_the_same_rows_for_any_split_and_resumes(world, accum, size):
    # From shortly before a block of draws ends to after it.
    first = BLOCK - BLOCK % 12 - 24
    whole = read_steps(1, 12, 1, steps=5, position=first)
    assert read_steps(world, accum, size, 5, first) == whole
    assert read_steps(world, accum, size, 2, first + 36) == whole[3:]


def test_names_may_come_in_any_order():
    config = mixture()
    datasets = dict(reversed(config.datasets.items()))
    other = built(datasets=datasets)
    first, second = (stream(Split(5), rows=rows) for rows in (built(), other))
    assert ids(itertools.islice(first, 9)) == ids(itertools.islice(second, 9))


def test_rows_say_where_they_are_from():
    rows = built(system_prompt="Be brief.")
    read = [rows[i] for i in range(len(rows))]
    assert len({row.id for row in read}) == len(read) == SIZES["few"] + SIZES["many"]
    assert all(row.id.startswith(f"{row.dataset}/digits/") for row in read)
    assert Counter(row.dataset for row in read) == {"few": 14, "many": 40}
    assert {row.kind for row in read} == {"few.which", "few.recite", "many.which", "many.parity"}
    assert read[0].labels == {"few", "few.which"}
    assert {row.messages[0]["content"] for row in read} == {"Be brief."}


def test_a_rejected_row_says_where_it_is_from(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    mine = ConversationsConfig(path=str(path), val_fraction=0)
    rows = built(
        datasets={**mixture().datasets, "mine": mine}, weights=dict.fromkeys((*NAMES, "mine"), 1.0)
    )
    row = rows[SIZES["few"] + SIZES["many"]]
    assert row.id.startswith("mine/") and "rows.jsonl" in row.id


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (3, 1)])
def test_validation_reads_every_row_once_and_no_batch_mixes(world, size):
    rows = built("validation")
    ranks = [list(validation_batches(rows, as_rows, Split(size, r, world))) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = list(itertools.chain.from_iterable(ranks))
    assert all(len({row.dataset for row in batch}) <= 1 for batch in batches)
    assert sorted(ids(batches)) == sorted(rows[i].id for i in range(len(rows)))
    found = Counter(row.dataset for batch in batches for row in batch)
    assert found == {"few": 5, "many": 11, "none": 3}


def test_a_tokenizer_is_trained_on_the_texts_of_all():
    one = DigitsConfig(kinds=["which"])
    assert mixture(datasets={"a": one}, weights={"a": 1}).corpus() == one.corpus()
    assert set(mixture().corpus()) == set(DigitsConfig(kinds=["recite"]).corpus())


DIGITS = DigitsConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"datasets": {}}, "data.datasets is empty"),
        ({"weights": {}}, "data.weights has none for few, many, none"),
        ({"weights": {"few": 1, "many": 1, "none": 0, "fw": 1}}, "data.weights names fw, but"),
        ({"weights": {"few": 1, "many": -1, "none": 0}}, "data.weights.many is -1"),
        ({"weights": {"few": 1, "many": math.nan, "none": 0}}, "data.weights.many is nan"),
        ({"weights": {"few": 0, "many": 0, "none": 0}}, "all 0"),
        ({"datasets": {"a": DIGITS, "A": DIGITS}}, "both 'a' and 'A'"),
        ({"datasets": {"a b": DIGITS}}, "'a b': a name is made of"),
        ({"datasets": {"a": DataConfig()}, "weights": {"a": 1}}, r"data.datasets.a is none of"),
        ({"datasets": {"a": mixture()}, "weights": {"a": 1}}, r"data.datasets.a is none of"),
        (
            {"datasets": {"a": DigitsConfig(pool="b")}, "weights": {"a": 1}},
            r"Dataset a \(where data.… is data.datasets.a.…\): data.pool is 'b'",
        ),
        ({"val_samples": 3}, "data.datasets.NAME.val_samples"),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(UserError, match=words):
        mixture(**settings).validate()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_data_set_is_refused(tmp_path, split):
    empty, row = tmp_path / "empty.jsonl", tmp_path / "row.jsonl"
    empty.write_text("")
    row.write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    paths = {"train": (empty, row), "validation": (row, empty)}[split]
    mine = ConversationsConfig(path=str(paths[0]), validation_path=str(paths[1]))
    with pytest.raises(UserError, match=r"mine.*(no rows|empty)"):
        built(split, datasets={"mine": mine, "a": DIGITS}, weights={"mine": 1, "a": 1})


def test_a_long_run_is_found_again_at_once():
    order = MixedOrder(built(), 0, True)
    position = 2_000_000
    assert abs(order.metrics(position)["data/share_few"] - 0.75) < 2e-3
