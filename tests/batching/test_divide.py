"""Which row goes where: every row once, within the budget, evenly."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from kd.batching.divide import EVEN, Layout, Packed, Padded, Size, Tally, balance, divide, fill

BUDGET = 100
LAYOUTS = [Padded(0, 0.1), Padded(0, 0.99), Padded(7, 0.3), Packed(0), Packed(7)]


def sizes(lengths: list[int], images: list[bool] | None = None) -> list[Size]:
    images = images or [True] * len(lengths)
    return [Size(i, n, image) for i, (n, image) in enumerate(zip(lengths, images, strict=True))]


@st.composite
def rows(draw) -> list[Size]:
    lengths = draw(st.lists(st.integers(1, BUDGET), max_size=40))
    return sizes(lengths, [draw(st.booleans()) for _ in lengths])


def tokens(group: list[Size], layout: Layout) -> int:
    """By the definition, not by the tally."""
    lengths = [size.length for size in group]
    if not any(size.has_image for size in group) and layout.filler_length:  # type: ignore[attr-defined]
        lengths.append(layout.filler_length)  # type: ignore[attr-defined]
    return sum(lengths) if layout.is_packed else len(lengths) * max(lengths)


@settings(max_examples=100, deadline=None)
@given(rows=rows(), layout=st.sampled_from(LAYOUTS), spare=st.integers(0, 3))
def test_every_row_once_and_within_the_budget(rows, layout, spare):
    least = len(fill(rows, layout, BUDGET))
    groups = divide(rows, layout, BUDGET, least + spare)
    assert len(groups) == least + spare
    assert sorted(itertools.chain(*groups), key=lambda s: s.slot) == rows
    filled = [group for group in groups if group]
    assert groups[: len(filled)] == filled, "the empty ones are the last"
    sizes_of = [tokens(group, layout) for group in filled]
    assert all(n <= BUDGET or len(g) == 1 for n, g in zip(sizes_of, filled, strict=True))
    assert sizes_of == sorted(sizes_of, reverse=True)
    # To divide into more is never to make the largest larger.
    if filled:
        tallies = [group.tally for group in fill(rows, layout, BUDGET)]
        assert max(sizes_of) <= max(map(layout.tokens, tallies))


def test_padded_groups_are_of_similar_rows_and_packed_ones_fit_well():
    mixed = sizes([50, 10, 48, 11, 49, 12, 50, 10])
    padded = divide(mixed, Padded(0, 0.99), BUDGET, 3)
    assert [sorted(s.length for s in g) for g in padded] == [[50, 50], [48, 49], [10, 10, 11, 12]]
    # Never more padding than is allowed, even where the budget would hold both.
    assert len(fill(sizes([50, 45]), Padded(0, 0.05), BUDGET)) == 1
    assert len(fill(sizes([50, 44]), Padded(0, 0.05), BUDGET)) == 2
    packed = divide(sizes([50, 10, 48, 11, 49, 12]), Packed(0), BUDGET, 3)
    assert [[s.length for s in g] for g in packed] == [[50, 10], [49, 11], [48, 12]]


def test_a_filler_counts_as_a_row():
    text = sizes([30, 30, 30], [False] * 3)
    assert len(fill(text, Padded(0, 0.99), 90)) == 1
    assert len(fill(text, Padded(20, 0.99), 90)) == 2
    assert Padded(20, 0.99).tokens(Tally() + text[0]) == 60
    assert Packed(20).tokens(Tally() + text[0]) == 50


@settings(max_examples=100, deadline=None)
@given(ranks=st.lists(st.lists(st.integers(1, BUDGET), max_size=12), min_size=1, max_size=6))
def test_ranks_are_evened_without_losing_a_row(ranks):
    slots = itertools.count()
    before = [[Size(next(slots), n, True) for n in lengths] for lengths in ranks]
    after = balance(before)
    assert sorted(s.slot for r in after for s in r) == sorted(s.slot for r in before for s in r)
    totals = [sum(size.length for size in sizes) for sizes in after]
    assert max(totals) <= max(sum(lengths) for lengths in ranks)
    gap = max(totals) - min(totals)
    full = after[totals.index(max(totals))]
    one_more = min((abs(gap - 2 * size.length) for size in full), default=gap)
    assert gap <= EVEN * sum(totals) / len(totals) or one_more >= gap, "another move would help"


def test_two_rows_change_places_where_none_alone_can_go():
    before = [[Size(0, 90, True), Size(1, 60, True)], [Size(2, 80, True), Size(3, 30, True)]]
    after = balance(before)
    assert sorted(sum(size.length for size in sizes) for sizes in after) == [120, 140]


def test_rows_stay_where_ranks_are_even():
    before = [sizes([50, 50]), [dataclasses.replace(s, slot=s.slot + 2) for s in sizes([99])]]
    assert balance(before) == before
