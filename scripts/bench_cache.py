"""Bytes per token, KL error and time of the codecs of the teacher cache.

    python scripts/bench_cache.py

Distributions over 151,936 tokens, in a random order of ids, as language models have them: `zipf`,
p ~ (rank + q)^-s with s in [0.8, 2.5] and noise; `confident`, the same with one to four tokens
raised by 2 to 14; `two`, two candidates and little else; `flat`, normal logits; and what is harder
than those, `slow`, p ~ exp(-rank / r) with r in [5, 60]. Hidden states: 2,048 numbers, a hundredth
of them ten times as large, and a head that gives logits of the standard deviation given. KL is of
what is decoded from what was there, in float64.

Shape legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from kd.teacher.base import Head
from kd.teacher.codec import DTYPES, Codec, HiddenCodec, TopKCodec
from kd.teacher.fidelity import divergence
from kd.teacher.payload import Hidden, Payload, join, top_k
from kd.types import DenseTargets

VOCAB = 151_936
KINDS = ("zipf", "confident", "two", "flat", "slow")


def make_logits(kind: str, rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """[N, V] float32, each row of a distribution of its own."""
    made = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, generator=made)

    rank_V = torch.arange(1, vocab + 1, dtype=torch.float32)
    noise_NV = torch.randn(rows, vocab, generator=made)
    if kind == "flat":
        logits_NV = noise_NV * uniform(1, 4)
    elif kind == "slow":
        logits_NV = (-rank_V / uniform(5, 60)).clamp(min=-13) + 0.3 * noise_NV
    elif kind == "two":
        logits_NV = -rank_V.log() + 0.3 * noise_NV
        logits_NV[:, :2] += uniform(10, 16)
    else:
        logits_NV = -uniform(0.8, 2.5) * (rank_V + uniform(0, 10)).log() + 0.3 * noise_NV
        if kind == "confident":
            logits_NV += uniform(2, 14) * (rank_V <= torch.randint(1, 5, (rows, 1), generator=made))
    return logits_NV[:, torch.randperm(vocab, generator=made)]


def make_hidden(rows: int, spread: float, size: int = 2048, vocab: int = VOCAB) -> DenseTargets:
    """Hidden states with outliers, and a head that gives logits of this standard deviation."""
    made = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(rows, size, generator=made)
    hidden_ND[:, torch.randperm(size, generator=made)[: size // 100]] *= 10
    weight_VD = torch.randn(vocab, size, generator=made)
    return DenseTargets(hidden_ND, weight_VD * (spread / hidden_ND.norm(dim=-1).mean()))


def measure(codec: Codec, payload: Payload, ids_N: Tensor, head: Head | None) -> str:
    """One row of the table, from the bytes on."""
    start = time.perf_counter()
    data = codec.encode(payload, ids_N)
    encoded = time.perf_counter()
    decoded = codec.decode(data, ids_N)
    times_us = [1e6 * s / len(data) for s in (encoded - start, time.perf_counter() - encoded)]
    kl_N = divergence(payload, decoded, ids_N, head)
    per_token = data.nbytes / len(data)
    return "{:,.0f} | {:.1e} | {:.1e} | {:.0f} + {:.0f} |".format(
        per_token, kl_N.mean(), kl_N.quantile(0.99), *times_us
    )


def top_of(logits_NV: Tensor, k: int) -> tuple[Payload, Tensor]:
    """The top-k of these distributions, and a token drawn from each."""
    ids_N = torch.distributions.Categorical(logits=logits_NV).sample()
    nothing_11, weight_V1 = torch.zeros(1, 1), torch.zeros(logits_NV.shape[1], 1)
    rows = zip(logits_NV, ids_N, strict=True)  # each as the bias of a head
    tops = [
        top_k(DenseTargets(nothing_11, weight_V1, row_V), id_[None], k, 1.0, len(row_V))
        for row_V, id_ in rows
    ]
    return join(tops), ids_N


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="bytes, KL error and time of the cache's codecs")
    parser.add_argument("-n", "--rows", type=int, default=500)
    parser.add_argument("-k", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns = "bytes per token | KL, mean | KL, 99 % | encode + decode, us per token |"
    print(f"| top-{args.k} of | {columns}\n|---|---|---|---|---|")
    for kind in KINDS:
        top, ids_N = top_of(make_logits(kind, args.rows), args.k)
        print(f"| {kind} |", measure(TopKCodec(args.k, VOCAB), top, ids_N, None))
    for spread in (2.0, 5.0):
        print(f"\n| hidden states, logits of {spread:g} | {columns}\n|---|---|---|---|---|")
        targets = make_hidden(args.rows, spread)
        head, hidden = Head(targets.weight_VD), Hidden(targets.hidden_ND)
        for dtype in DTYPES:
            codec = HiddenCodec(dtype, targets.hidden_ND.shape[1])
            print(f"| {dtype} |", measure(codec, hidden, torch.zeros(args.rows), head))


if __name__ == "__main__":
    main()
