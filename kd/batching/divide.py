"""Which row goes to which micro-batch: arithmetic on lengths, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

EVEN = 0.05
"""Of the mean: ranks whose tokens are closer than that are left as they are."""


@dataclass(frozen=True)
class Size:
    """What is to be known of a row to place it."""

    slot: int
    """Which row."""
    length: int
    """Tokens, in the longer of the renderings."""
    has_image: bool


@dataclass(frozen=True)
class Tally:
    """Of the rows of a micro-batch."""

    rows: int = 0
    total: int = 0
    longest: int = 0
    has_image: bool = False

    def __add__(self, size: Size) -> Tally:
        """With one more row."""
        return Tally(
            self.rows + 1,
            self.total + size.length,
            max(self.longest, size.length),
            self.has_image or size.has_image,
        )


class Layout(Protocol):
    """How a model reads the rows of a micro-batch."""

    @property
    def is_packed(self) -> bool:
        """Whether that is one sequence."""
        ...

    def tokens(self, tally: Tally) -> int:
        """Tokens read, padding and the filler of rows without an image included."""
        ...

    def fits(self, tally: Tally, max_tokens: int) -> bool:
        """Whether these rows make a micro-batch."""
        ...

    def first_open(self, groups: int) -> int:
        """The first of so many groups that may take another row, shorter than all of theirs."""
        ...


@dataclass(frozen=True)
class Padded:
    """Every row as long as the longest."""

    filler_length: int
    """Tokens of the row that a group without an image gets; 0: it gets none."""
    max_padding: float
    """Share of a group, without its filler."""
    is_packed: bool = False

    def tokens(self, tally: Tally) -> int:
        """See `Layout`."""
        filler = self.filler_length * (not tally.has_image)
        return (tally.rows + (filler > 0)) * max(tally.longest, filler)

    def fits(self, tally: Tally, max_tokens: int) -> bool:
        """See `Layout`."""
        similar = tally.total >= (1 - self.max_padding) * tally.rows * tally.longest
        return similar and self.tokens(tally) <= max_tokens

    def first_open(self, groups: int) -> int:
        """The last: a short row among long ones would be padding."""
        return max(0, groups - 1)


@dataclass(frozen=True)
class Packed:
    """One row after the other."""

    filler_length: int
    is_packed: bool = True

    def tokens(self, tally: Tally) -> int:
        """See `Layout`."""
        return tally.total + self.filler_length * (not tally.has_image)

    def fits(self, tally: Tally, max_tokens: int) -> bool:
        """See `Layout`."""
        return self.tokens(tally) <= max_tokens

    def first_open(self, groups: int) -> int:
        """Any of them."""
        return 0


@dataclass
class Group:
    """The rows of a micro-batch."""

    tally: Tally = Tally()
    sizes: list[Size] = field(default_factory=list)

    def add(self, size: Size) -> None:
        """One more row."""
        self.tally += size
        self.sizes.append(size)


def fill(sizes: Sequence[Size], layout: Layout, max_tokens: int) -> list[Group]:
    """Groups of at most `max_tokens`, the longest rows first; a row alone may have more."""
    groups: list[Group] = []
    for size in sorted(sizes, key=lambda size: (-size.length, size.slot)):
        candidates = groups[layout.first_open(len(groups)) :]
        fitting = (g for g in candidates if layout.fits(g.tally + size, max_tokens))
        group = next(fitting, None)
        if group is None:
            group = Group()
            groups.append(group)
        group.add(size)
    return groups


def divide(sizes: Sequence[Size], layout: Layout, max_tokens: int, count: int) -> list[list[Size]]:
    """`count` groups, the largest as small as can be, in falling order; the last may be empty.

    `count` must be enough at `max_tokens`. The smallest bound that is still enough is found by
    halving: MULTIFIT (Coffman, Garey & Johnson 1978, https://doi.org/10.1137/0207001).
    """

    def largest(groups: list[Group]) -> int:
        return max((layout.tokens(group.tally) for group in groups), default=0)

    best, low, high = fill(sizes, layout, max_tokens), 0, max_tokens
    assert len(best) <= count
    while high - low > 1:
        bound = (low + high) // 2
        groups = fill(sizes, layout, bound)
        if len(groups) <= count:
            # Rows alone may be above the bound, by their filler.
            best, high = min(best, groups, key=largest), bound
        else:
            low = bound
    best.sort(key=lambda group: layout.tokens(group.tally), reverse=True)
    return [group.sizes for group in best] + [[] for _ in range(count - len(best))]


def balance(ranks: list[list[Size]]) -> list[list[Size]]:
    """Rows go from the rank with the most tokens to that with the fewest, or are exchanged between
    the two, while that evens them.
    """
    ranks = [list(sizes) for sizes in ranks]
    totals = [sum(size.length for size in sizes) for sizes in ranks]
    enough = EVEN * sum(totals) / len(totals)
    while True:
        full, empty = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[full] - totals[empty]
        moves = [
            (given.length - (0 if taken is None else taken.length), given, taken)
            for given in ranks[full]
            for taken in (None, *ranks[empty])
        ]
        # The gap changes by twice what moves.
        best = min(moves, key=lambda move: abs(gap - 2 * move[0]), default=None)
        if gap <= enough or best is None or not 0 < best[0] < gap:
            return ranks
        change, given, taken = best
        ranks[full].remove(given)
        ranks[empty].append(given)
        if taken is not None:
            ranks[empty].remove(taken)
            ranks[full].append(taken)
        totals[full] -= change
        totals[empty] += change
