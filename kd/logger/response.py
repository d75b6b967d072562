"""Responses token by token, the divergence at each token as a heat between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SCALE_PERCENTILE = 99
HIGHEST = 3
"""So many tokens of a response are also named with their divergence."""
MARKS = {"\n": "↵\n", "\t": "⇥\t"}


@dataclass
class Token:
    """One token of a response, as it is shown."""

    position: int
    """From 1."""
    text: str
    divergence: float
    heat: float | None
    """Share of the scale, 0 to 1; None: the divergence is not finite."""


@dataclass
class Spread:
    """What the divergences of a response come to; None where none of them is finite."""

    mean: float | None
    highest: float | None
    nonfinite: int
    """How many are NaN or infinite; they are not in the other two."""


def spread(divergence: list[float]) -> Spread:
    """Mean, highest, and how many are not finite."""
    finite = [x for x in divergence if math.isfinite(x)]
    mean = math.fsum(finite) / len(finite) if finite else None
    return Spread(mean, max(finite, default=None), len(divergence) - len(finite))


def scale(divergences: Iterable[list[float]]) -> float:
    """The divergence at full heat: the 99th percentile of all finite ones; 0 if there is none."""
    finite = [x for divergence in divergences for x in divergence if math.isfinite(x)]
    return float(np.percentile(finite, SCALE_PERCENTILE)) if finite else 0.0


def heated(tokens: list[str], divergence: list[float], full: float) -> list[Token]:
    """The tokens of a response with their heat on a scale from 0 to `full`."""
    values = enumerate(zip(tokens, divergence, strict=True), 1)
    return [Token(i, visible(text), x, _heat(x, full)) for i, (text, x) in values]


def highest(tokens: list[Token]) -> list[Token]:
    """The few tokens of the highest divergence, the highest first; a NaN is above all."""

    def key(token: Token) -> float:
        return math.inf if math.isnan(token.divergence) else token.divergence

    return sorted(tokens, key=key, reverse=True)[:HIGHEST]


def visible(text: str) -> str:
    """`text` with a mark for line ends and tabs, an escape for what does not print, ∅ for none."""
    return "".join(MARKS.get(c) or (c if c.isprintable() else _escape(c)) for c in text) or "∅"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _heat(divergence: float, full: float) -> float | None:
    if not math.isfinite(divergence):
        return None
    if full <= 0:  # nearly all are 0: what is not stands out
        return float(divergence > 0)
    return min(max(divergence / full, 0.0), 1.0)
