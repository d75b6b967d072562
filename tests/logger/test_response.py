from __future__ import annotations

import math

import pytest

from kd.logger.response import heated, highest, scale, spread, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" word", " word"),
        ("<|im_end|>", "<|im_end|>"),
        ("\n\n", "↵\n↵\n"),
        ("\tx", "⇥\tx"),
        ("\r", "\\r"),
        ("\u200b\u202e", "\\u200b\\u202e"),
        ("\x00", "\\x00"),
        ("\ud800", "\\ud800"),
        ("数字 é", "数字 é"),
        ("", "∅"),
    ],
)
def test_what_has_no_shape_is_made_visible(text, shown):
    assert visible(text) == shown


def test_scale_ends_at_the_99th_percentile_of_all_responses():
    assert scale([[float(x) for x in range(50)], [float(x) for x in range(50, 101)]]) == 99.0
    assert scale([[1.0, math.nan], [], [math.inf, 1.0]]) == 1.0
    assert scale([]) == scale([[math.nan]]) == 0.0


def test_heat_is_the_share_of_the_scale():
    divergence = [0.0, -1e-9, 0.5, 2.0, 7.0, math.nan, math.inf]
    tokens = heated(list("abcdefg"), divergence, full=2.0)
    assert [token.heat for token in tokens] == [0.0, 0.0, 0.25, 1.0, 1.0, None, None]
    assert [token.position for token in tokens] == [1, 2, 3, 4, 5, 6, 7]


def test_what_stands_out_of_zeros_is_seen():
    divergence = [0.0] * 200 + [0.1]
    tokens = heated(["x"] * 201, divergence, scale([divergence]))
    assert [token.heat for token in tokens[-2:]] == [0.0, 1.0]


def test_highest_come_first_and_nan_is_not_lost():
    tokens = heated(list("abcde"), [0.1, 0.4, math.nan, 0.3, 0.2], full=1.0)
    assert [token.text for token in highest(tokens)] == ["c", "b", "d"]


def test_spread_leaves_out_and_counts_what_is_not_finite():
    found = spread([1.0, math.nan, 2.0, -math.inf])
    assert (found.mean, found.highest, found.nonfinite) == (1.5, 2.0, 2)
    found = spread([math.nan])
    assert (found.mean, found.highest, found.nonfinite) == (None, None, 1)
    assert spread([]).mean is None
