from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.teacher.bits import EliasFano, pack, unpack
from kd.teacher.codec import DTYPES, HiddenCodec, TopKCodec
from kd.teacher.fidelity import buckets, divergence
from kd.teacher.payload import ABSENT, Hidden, TopK
from kd.types import UserError

VOCAB = 151_936


@pytest.fixture(scope="module")
def bench(repo):
    spec = importlib.util.spec_from_file_location("bench_cache", repo / "scripts/bench_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(st.integers(1, 32), st.integers(0, 40), st.integers(0, 5), st.randoms())
def test_integers_in_any_number_of_bits(bits, k, rows, random):
    values = np.array([[random.getrandbits(bits) for _ in range(k)] for _ in range(rows)])
    values = values.reshape(rows, k)
    data = pack(values, bits)
    assert data.shape == (rows, math.ceil(k * bits / 8))
    assert np.array_equal(unpack(data, bits, k), values)


@given(st.data(), st.integers(1, 5000))
def test_ascending_ids(data, vocab):
    k = data.draw(st.integers(1, min(vocab, 300)))
    ids = st.lists(st.integers(0, vocab - 1), min_size=k, max_size=k)  # also several times
    rows = np.sort(np.array(data.draw(st.lists(ids, min_size=1, max_size=3))), axis=1)
    code = EliasFano(k, vocab)
    encoded = code.encode(rows)
    assert encoded.shape == (len(rows), code.num_bytes)
    assert code.num_bytes * 8 <= k * (2 + max(0, math.log2(vocab / k))) + 16
    assert np.array_equal(code.decode(encoded), rows)


def make_top(seed: int, rows: int, k: int, vocab: int, spread: float) -> tuple[TopK, torch.Tensor]:
    """Of logits with so wide a spread, in which some entries are impossible."""
    made = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(rows, vocab, generator=made, dtype=torch.float64) * spread
    logits_NV[torch.rand(rows, vocab, generator=made) < 0.05] = -torch.inf
    logits_NV[:, 0] = 0  # never all of them
    logp_NV = logits_NV.log_softmax(-1).clamp(min=ABSENT)
    ids_N = torch.randint(0, vocab, (rows,), generator=made)
    logp_NK, ids_NK = logp_NV.topk(k, dim=-1)
    rest_NV = logp_NV.scatter(1, torch.cat([ids_NK, ids_N[:, None]], 1), ABSENT)
    response_N = logp_NV.gather(1, ids_N[:, None])[:, 0]
    # A place that is not taken has the response's own token.
    ids_NK = ids_NK.where(logp_NK > ABSENT / 2, ids_N[:, None])
    return TopK(ids_NK, logp_NK, response_N, rest_NV.logsumexp(-1).clamp(min=ABSENT)), ids_N


TOPS = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(91, 400),
    st.floats(0.01, 30),
)


def by_id(top: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    # Equal ids are places that are not taken; in the order of their ids, then of their log-probs.
    order = np.lexsort((top.logp_NK.numpy(), top.ids_NK.numpy()), axis=1)
    order = torch.from_numpy(order)
    return top.ids_NK.gather(1, order), top.logp_NK.gather(1, order).double()


@given(TOPS)
@settings(deadline=None, max_examples=300)
def test_top_k_comes_back(numbers):
    _, rows, k, vocab, _ = numbers
    top, ids_N = make_top(*numbers)
    codec = TopKCodec(k, vocab)
    data = codec.encode(top, ids_N)
    assert data.shape == (rows, codec.token_bytes)
    ids_bits = k * (2 + math.log2(vocab / k)) + 16
    assert codec.token_bytes <= math.ceil((ids_bits + 5 * k) / 8) + 1 + min(k, 16) + 8

    decoded = codec.decode(data, ids_N)
    (ids, exact), (ids_decoded, kept) = by_id(top), by_id(decoded)
    assert torch.equal(ids_decoded, ids)
    assert torch.equal(kept <= ABSENT / 2, exact <= ABSENT / 2)
    assert torch.equal(decoded.tail_N <= ABSENT / 2, top.tail_N <= ABSENT / 2)
    assert torch.equal(decoded.response_logp_N <= ABSENT / 2, top.response_logp_N <= ABSENT / 2)
    assert (decoded.logp_NK.diff(dim=-1) <= 0).all()
    assert buckets(decoded, ids_N).logsumexp(1).abs().max() < 1e-5

    # Within half a level in u = p^(1/4), but for float16 and what the sum was off by.
    floor = (top.logp_NK[:, min(16, k - 1)] / 4).exp()[:, None]
    least = (top.logp_NK[:, -1] / 4).exp()[:, None]
    u = (exact / 4).exp()
    step = torch.where(u > floor, (1 - floor) / 255, (floor - least) / 30)
    off = torch.where((least == 0) & (u < step), 1, 0.5)  # level 0 may be for the impossible alone
    bound = off * step + 2e-3 * u
    moved = ((u + bound) ** 4 - u**4).sum(1, keepdim=True) + 1e-3
    bound = bound + (u + bound) * moved
    assert ((kept / 4).exp() - u).abs().le(bound + 1e-6).all()


def test_the_response_is_known_whether_it_is_among_the_k_or_not():
    """The last row has one token alone; the other place is not taken."""
    p_NK = torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.5, 0.2], [0.5, 0.0]])
    response_N, tail_N = torch.tensor([0.2, 0.1, 0, 0.1]), torch.tensor([0.3, 0.2, 0.3, 0.4])
    ids_N = torch.tensor([3, 9, 5, 9])
    ids_NK = torch.tensor([[7, 3], [7, 3], [7, 3], [7, 9]])
    top = TopK(ids_NK, *(p.log().clamp(min=ABSENT) for p in (p_NK, response_N, tail_N)))
    codec = TopKCodec(2, 20)
    decoded = codec.decode(codec.encode(top, ids_N), ids_N)
    assert torch.equal(decoded.ids_NK, ids_NK)
    for kept, p in (
        (decoded.logp_NK, p_NK),
        (decoded.response_logp_N, response_N),
        (decoded.tail_N, tail_N),
    ):
        torch.testing.assert_close(kept.exp(), p, atol=2e-3, rtol=0)


def test_no_rows_and_many_rows():
    codec = TopKCodec(4, 50)
    none_N, none_NK = torch.empty(0), torch.empty(0, 4)
    ids_N = torch.empty(0, dtype=torch.int64)
    data = codec.encode(TopK(none_NK.long(), none_NK, none_N, none_N), ids_N)
    assert data.shape == (0, codec.token_bytes) and len(codec.decode(data, ids_N)) == 0
    top, ids_N = make_top(0, 10_000, 4, 50, 1.0)
    data = codec.encode(top, ids_N)
    assert np.array_equal(
        data[-3:],
        codec.encode(
            TopK(*(x[-3:] for x in (top.ids_NK, top.logp_NK, top.response_logp_N, top.tail_N))),
            ids_N[-3:],
        ),
    )
    assert torch.equal(codec.decode(data, ids_N).ids_NK.sort(1)[0], top.ids_NK.sort(1)[0])


def test_under_300_bytes_and_a_divergence_of_1e_4(bench):
    codec = TopKCodec(128, VOCAB)
    assert codec.token_bytes == 299
    mean, worst = {}, {}
    for kind in ("zipf", "confident", "two", "flat"):
        top, ids_N = bench.top_of(bench.make_logits(kind, 24), 128)
        decoded = codec.decode(codec.encode(top, ids_N), ids_N)
        kl_N = divergence(top, decoded, ids_N, None)
        mean[kind], worst[kind] = kl_N.mean().item(), kl_N.max().item()
    assert max(mean.values()) < 1e-4 and max(worst.values()) < 4e-4, (mean, worst)


@pytest.mark.parametrize(
    ("dtype", "per_token"), [("float32", 400), ("bfloat16", 200), ("float16", 200), ("float8", 104)]
)
def test_hidden_states(dtype, per_token):
    hidden_ND = torch.randn(7, 100) * torch.logspace(-3, 3, 7)[:, None]
    hidden_ND[3] = 0
    codec = HiddenCodec(dtype, 100)
    data = codec.encode(Hidden(hidden_ND), torch.zeros(7))
    assert data.shape == (7, codec.token_bytes) == (7, per_token)
    decoded = codec.decode(data, torch.zeros(7)).hidden_ND
    if dtype != "float8":
        assert torch.equal(decoded, hidden_ND.to(DTYPES[dtype]))
        return
    # Three bits of mantissa, down to numbers so small that they are no longer normal.
    largest = hidden_ND.abs().amax(1, keepdim=True)
    bound = torch.maximum(hidden_ND.abs() / 16, largest / 448 * 2**-9 / 2)
    assert (decoded - hidden_ND).abs().le(bound * 1.001).all()


def test_what_is_not_finite_is_refused():
    hidden_ND = torch.full((1, 4), 1e5)
    HiddenCodec("bfloat16", 4).encode(Hidden(hidden_ND), torch.zeros(1))
    with pytest.raises(UserError, match=r"not finite as torch\.float16"):
        HiddenCodec("float16", 4).encode(Hidden(hidden_ND), torch.zeros(1))
    top, ids_N = make_top(0, 2, 3, 20, 1.0)
    top.logp_NK[1, 2] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        TopKCodec(3, 20).encode(top, ids_N)
