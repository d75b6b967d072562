"""The weighted loss against the formulas, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kd.dflash import BlockMaker, DecayWeighting, DPaceWeighting, block_loss
from kd.dflash.loss import whole_blocks
from kd.types import UserError

SIZE, VOCAB, WIDTH = 6, 50, 16


@pytest.fixture(scope="module")
def case():
    """Blocks of two responses, of which some are cut by the end; hidden states, head, bias."""
    torch.manual_seed(0)
    responses = [torch.randint(0, VOCAB, (n,)).tolist() for n in (9, 4)]
    maker = BlockMaker(SIZE, VOCAB - 1, None)
    blocks = maker.at([[0, 2, 5, 7], [0, 1, 2]], [3, 8], responses, 2)
    hidden = torch.randn(len(blocks.labels_N), WIDTH, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64) * 0.4
    return blocks, hidden, weight, torch.randn(VOCAB, dtype=torch.float64)


def per_block(blocks, hidden, weight, bias):
    """Per block, [-log q_1, -log q_2, …]."""
    log_probs = (hidden @ weight.T + bias).log_softmax(-1)
    ce = -log_probs[torch.arange(len(hidden)), blocks.labels_N]
    return ce.tensor_split(blocks.block_ends[:-1])


def decayed(blocks, *inputs, gamma: float):
    rows = per_block(blocks, *inputs)
    weights = [math.exp(-k / gamma) for k in range(SIZE - 1)]
    total = sum(weights[k] * ce for row in rows for k, ce in enumerate(row))
    return total / sum(weights[k] for row in rows for k in range(len(row)))


def d_pace(blocks, *inputs, alpha: float):
    rows = per_block(blocks, *inputs)
    total = 0.0
    for row in rows:
        smooth = [(1 - alpha) * math.exp(-ce.item()) + alpha for ce in row]
        reached = [math.prod(smooth[: m + 1]) for m in range(len(row))]
        total = total + sum(sum(reached[k:]) * ce for k, ce in enumerate(row))
    return total / len(rows)


CASES = [
    (DecayWeighting(), lambda *x: decayed(*x, gamma=3.0)),
    (DecayWeighting(gamma=1.5), lambda *x: decayed(*x, gamma=1.5)),
    (DPaceWeighting(), lambda *x: d_pace(*x, alpha=0.5)),
    (DPaceWeighting(alpha=0.0), lambda *x: d_pace(*x, alpha=0.0)),
]


@pytest.mark.parametrize("chunk_rows", [None, 6, 1])
@pytest.mark.parametrize(("weighting", "reference"), CASES)
def test_against_the_formula(case, monkeypatch, weighting, reference, chunk_rows):
    blocks, hidden, weight, bias = case
    if chunk_rows:
        monkeypatch.setattr(
            "kd.dflash.loss.whole_blocks", lambda ends, most: whole_blocks(ends, chunk_rows)
        )
    norm = weighting.normaliser(blocks.counts(), blocks.num_blocks)
    found_hidden, wanted_hidden = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = block_loss(found_hidden, weight, bias, blocks, weighting, norm)
    wanted = reference(blocks, wanted_hidden, weight, bias)
    found.loss.backward()
    wanted.backward()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found_hidden.grad, wanted_hidden.grad, rtol=1e-10, atol=1e-14)


def test_right_tokens_are_counted_by_position(case):
    blocks, hidden, weight, bias = case
    out = block_loss(hidden, weight, bias, blocks, DecayWeighting(), 1.0)
    right = ((hidden @ weight.T + bias).argmax(-1) == blocks.labels_N).tensor_split(
        blocks.block_ends[:-1]
    )
    for row, correct in zip(right, out.correct_AT, strict=True):
        assert correct.tolist() == [*row.long().tolist(), *[0] * (SIZE - 1 - len(row))]
    prefix = [len(row) if row.all() else int(row.long().argmin()) for row in right]
    assert out.num_accepted_A.tolist() == prefix
    assert out.num_correct_T.sum() == sum(int(row.sum()) for row in right)


def test_no_blocks_at_all_is_a_zero_that_can_be_differentiated(case):
    _, hidden, weight, bias = case
    nothing = BlockMaker(SIZE, 0, None).at([], [], [], 1)
    for weighting in (DecayWeighting(), DPaceWeighting()):
        none = hidden[:0].clone().requires_grad_()
        out = block_loss(none, weight, bias, nothing, weighting, 1.0)
        out.loss.backward()
        assert out.loss == 0 and none.grad is not None and out.correct_AT.shape == (0, SIZE - 1)


def test_chunks_hold_whole_blocks():
    ends = [3, 5, 9, 14, 15]
    for most in range(1, 17):
        chunks = whole_blocks(ends, most)
        assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]]
        assert chunks[0].start == 0 and chunks[-1].stop == 15
        assert all(c.stop in ends for c in chunks)
        for chunk in chunks:
            inside = [end for end in ends if chunk.start < end < chunk.stop]
            assert chunk.stop - chunk.start <= most or not inside
    assert whole_blocks([], 5) == []


@pytest.mark.parametrize(("size", "gamma"), [(16, 7), (10, 5), (8, 4)])
def test_the_published_decays(size, gamma):
    assert DecayWeighting().resolved_gamma(size) == pytest.approx(gamma)


@pytest.mark.parametrize(
    "weighting", [DecayWeighting(gamma=0.0), DPaceWeighting(alpha=1.5), DPaceWeighting(alpha=-0.1)]
)
def test_values_out_of_range(weighting):
    with pytest.raises(UserError, match=r"draft\.weighting\.(gamma|alpha)="):
        weighting.validate("draft.weighting")
