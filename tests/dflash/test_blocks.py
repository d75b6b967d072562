"""Anchors, what stands in blocks, and what they see."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from kd.dflash import BlockMaker
from kd.dflash.attention import attention
from kd.types import Rollout, UserError
from tests.dflash.conftest import Pair, sample

MASK = 999


def blocks_at(offsets: list[list[int]], starts: list[int], responses: list[list[int]], size: int):
    return BlockMaker(size, MASK, None).at(offsets, starts, responses, len(responses))


def test_a_block_by_hand():
    """Twelve tokens of which the last seven are the response; anchor 6, four tokens."""
    response = [105, 106, 107, 108, 109, 110, 111]
    blocks = blocks_at([[1]], [5], [response], 4)
    assert blocks.ids_BQ.tolist() == [[106, MASK, MASK, MASK]]
    assert blocks.positions_BQ.tolist() == [[6, 7, 8, 9]]
    assert blocks.rows_N.tolist() == [1, 2, 3] and blocks.offsets_N.tolist() == [1, 2, 3]
    assert blocks.labels_N.tolist() == [107, 108, 109]
    seen = attention("dense", blocks.anchors_BA, blocks.valid_BA, 12, 4).seen_B1QK
    for position in range(4):
        assert seen[0, 0, position].nonzero().flatten().tolist() == [*range(6), 12, 13, 14, 15]


def test_the_end_of_a_response_and_rows_that_differ():
    blocks = blocks_at([[0, 2], [1]], [3, 9], [[1, 2, 3, 4], [5, 6, 7]], 3)
    # The second row has one block: the other is padding. The end cuts the last positions.
    assert blocks.valid_BA.tolist() == [[True, True], [True, False]]
    assert blocks.labels_N.tolist() == [2, 3, 4, 7]
    assert blocks.rows_N.tolist() == [1, 2, 4, 7]  # of [2 rows, 2 blocks, 3 tokens]
    assert blocks.block_N.tolist() == [0, 0, 1, 2] and blocks.block_ends == [2, 3, 4]
    assert blocks.counts() == [3, 1]
    assert blocks.num_blocks == 3


def random_blocks(seed: int):
    random = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, 20, (3, 5), generator=random).sort(-1).values
    return anchors, torch.rand(3, 5, generator=random) > 0.3


def test_dense_mask_against_the_rule():
    anchors, valid = random_blocks(0)
    seen = attention("dense", anchors, valid, 20, 4).seen_B1QK
    for b in range(3):
        for q in range(20):
            for k in range(40):
                own = k >= 20 and (k - 20) // 4 == q // 4
                before = k < 20 and bool(valid[b, q // 4]) and k < anchors[b, q // 4]
                assert bool(seen[b, 0, q, k]) == (own or before)


@pytest.mark.parametrize(
    ("num_context", "blocks", "size"),
    [
        (20, 5, 4),
        (128, 32, 4),
        (300, 40, 16),
        (256, 3, 256),
        (384, 64, 8),
        (1000, 70, 10),
        (130, 2, 200),
        (513, 1, 128),
        (1, 1, 1),
    ],
)
def test_tiles_are_those_of_the_whole_mask(num_context, blocks, size):
    """Against the mask that torch makes by asking about every pair."""
    random = torch.Generator().manual_seed(blocks)
    shape = 4, blocks
    anchors = torch.randint(0, num_context, shape, generator=random).sort(-1).values
    anchors[1] = num_context - 1  # what a whole tile sees
    valid = torch.rand(shape, generator=random) > 0.2
    valid[1], valid[2] = True, False
    mask = attention("flex", anchors, valid, num_context, size).mask
    queries = blocks * size
    expected = create_block_mask(
        mask.mask_mod, 4, None, queries, num_context + queries, device="cpu"
    )
    assert mask.shape == expected.shape and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    sides = [f"{of}{side}" for of in ("", "full_") for side in ("kv", "q")]
    for name in [f"{side}_{what}" for side in sides for what in ("num_blocks", "indices")]:
        ours, theirs = getattr(mask, name), getattr(expected, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    # And the whole mask is the dense one's.
    index = [torch.arange(n) for n in (4, 1, queries, num_context + queries)]
    whole = mask.mask_mod(*torch.meshgrid(*index, indexing="ij"))
    assert torch.equal(whole, attention("dense", anchors, valid, num_context, size).seen_B1QK)


def test_some_tiles_are_seen_whole():
    """Else the comparison above would not tell."""
    anchors, valid = torch.full((1, 40), 299), torch.ones(1, 40, dtype=torch.bool)
    mask = attention("flex", anchors, valid, 300, 16).mask
    assert mask.full_kv_num_blocks.tolist() == [[[2, 2, 2, 2, 2]]]
    mask = attention("flex", torch.zeros(1, 2, dtype=torch.int64), valid[:, :2], 128, 128).mask
    assert mask.full_kv_num_blocks.tolist() == [[[1, 1]]] and mask.kv_num_blocks.sum() == 0


def attended(kind: str, device: str, anchors, valid, *, backward: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inputs = [
        torch.randn(3, heads, length, 16).to(device).requires_grad_(backward)
        for heads, length in ((4, 20), (2, 40), (2, 40))
    ]
    out = attention(kind, anchors.to(device), valid.to(device), 20, 4)(*inputs)
    if not backward:
        return [out]
    out.square().sum().backward()
    return [out, *(x.grad for x in inputs if x.grad is not None)]


# On a CPU FlexAttention has no backward.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flex_gives_what_the_dense_mask_gives_also_for_padding(device):
    anchors, valid = random_blocks(1)
    valid[2] = False  # a row of padding alone
    backward = device == "cuda"
    dense = attended("dense", device, anchors, valid, backward=backward)
    flex = attended("flex", device, anchors, valid, backward=backward)
    for expected, found in zip(dense, flex, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_has_finite_gradients():
    anchors, valid = random_blocks(1)
    for x in attended("dense", "cpu", anchors, torch.zeros_like(valid), backward=True):
        assert torch.isfinite(x).all()


@pytest.fixture(scope="module")
def batch(full: Pair):
    rollouts = [Rollout(sample(i), [*range(30, 70)], True, 0, "teacher") for i in range(4)]
    return full.collator(rollouts)


def test_anchors_are_drawn_by_row_and_step_whatever_is_beside_it(full, batch):
    maker = BlockMaker(4, MASK, 6, seed=1)
    together = maker(batch, step=3)
    for b, rollout in enumerate(batch.rollouts):
        alone = maker(full.collator([rollout]), step=3)
        assert alone.anchors_BA[0].tolist() == together.anchors_BA[b].tolist()
    rows = [tuple(row) for row in together.anchors_BA.tolist()]
    assert len(set(rows)) == len(rows), "rows differ, the same answer or not"
    assert all(row == tuple(sorted(set(row))) for row in rows)
    others = [maker(batch, step=4), BlockMaker(4, MASK, 6, seed=2)(batch, step=3)]
    assert all(other.anchors_BA.tolist() != together.anchors_BA.tolist() for other in others)


def test_every_anchor_is_as_likely(full, batch):
    maker = BlockMaker(4, MASK, 10)
    one = full.collator(batch.rollouts[:1])
    start = len(one.responses[0].prompt_ids)
    counts = torch.zeros(39)
    for step in range(400):
        counts[maker(one, step).anchors_BA[0] - start] += 1
    share = counts / 400
    assert (share - 10 / 39).abs().max() < 5 * (10 / 39 * 29 / 39 / 400) ** 0.5


def test_responses_of_fewer_than_two_tokens_have_no_block(full):
    rollouts = [
        Rollout(sample(i), ids, True, 0, "teacher") for i, ids in enumerate([[5], [], [5, 6]])
    ]
    blocks = BlockMaker(4, MASK, 512)(full.collator(rollouts))
    assert blocks.num_blocks == 1 and blocks.labels_N.tolist() == [6]


def test_the_mask_token_in_the_data_is_refused(full):
    batch = full.collator([Rollout(sample(0), [5, 6, 7], True, 0, "teacher")])
    with pytest.raises(UserError, match=r"row0 holds token 6.*\n?.*mask_token_id"):
        BlockMaker(4, 6, None)(batch)
    held = batch.responses[0].prompt_ids[0]
    with pytest.raises(UserError, match=f"row0 holds token {held}"):
        BlockMaker(4, held, None)(batch)
