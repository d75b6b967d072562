"""What a teacher says of a response, apart from the teacher itself: it travels and is kept.

Shape legend: N response tokens, C of them in a chunk, D hidden, V vocabulary, K the top-k.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.objective import accumulation_dtype, head_logits
from kd.types import DenseTargets, UserError

ABSENT = -1e30
"""Log-prob of an entry that does not exist: e to it is 0, and unlike -inf it makes no NaN."""

CHUNK_ROWS = 256


@dataclass
class Hidden:
    """The hidden states that the head reads: with the head, the whole distribution, exactly."""

    hidden_ND: Tensor

    def __len__(self) -> int:
        return len(self.hidden_ND)


@dataclass
class TopK:
    """The k likeliest tokens, the token of the response itself, and the mass of all others."""

    ids_NK: Tensor
    """In descending order of probability. A place that is not taken has the response's own token
    and the log-prob ABSENT."""
    logp_NK: Tensor
    response_logp_N: Tensor
    """Of the response's own token, be it among the k or not."""
    tail_N: Tensor
    """Log of the mass of all but the k and the response's own token; ABSENT where none is left."""

    def __len__(self) -> int:
        return len(self.ids_NK)


Payload = Hidden | TopK


def tensors(payload: Payload) -> dict[str, Tensor]:
    """By their names."""
    return {f.name: getattr(payload, f.name) for f in dataclasses.fields(payload)}


def from_tensors(found: dict[str, Tensor]) -> Payload:
    """The reverse of `tensors`. Raises ValueError for other names."""
    for kind in (Hidden, TopK):
        if set(found) == {f.name for f in dataclasses.fields(kind)}:
            return kind(**found)
    raise ValueError(f"tensors named {sorted(found)}")


def join(payloads: list[Payload]) -> Payload:
    """Several responses' as one; at least one is given, all of one kind."""
    parts = [tensors(payload) for payload in payloads]
    return from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def split(payload: Payload, lengths: list[int]) -> list[Payload]:
    """The reverse of `join`."""
    parts = {name: x.split(lengths) for name, x in tensors(payload).items()}
    return [
        from_tensors(dict(zip(parts, row, strict=True)))
        for row in zip(*parts.values(), strict=True)
    ]


@torch.no_grad()
def top_k(
    targets: DenseTargets, response_ids_N: Tensor, k: int, temperature: float, vocab: int
) -> TopK:
    """Of softmax(logits / temperature) over the first `vocab` entries, a chunk of rows at a time.

    Raises UserError where k is not below `vocab`, or a response has a token beyond it.
    """
    weight_VD = targets.weight_VD[:vocab]
    if not 1 <= k < len(weight_VD):
        raise UserError(f"top-k of {k}: must be at least 1 and below the {len(weight_VD)} tokens")
    if response_ids_N.numel() and int(response_ids_N.max()) >= len(weight_VD):
        raise UserError(f"a response has a token beyond the {len(weight_VD)} of the teacher")
    bias_V = None if targets.bias_V is None else targets.bias_V[:vocab]
    dtype = accumulation_dtype(weight_VD.dtype)
    buffer = weight_VD.new_empty(min(CHUNK_ROWS, len(response_ids_N)), len(weight_VD), dtype=dtype)
    parts = []
    for start in range(0, len(response_ids_N), CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, len(response_ids_N)))
        logits_CV = buffer[: rows.stop - rows.start]
        head_logits(targets.hidden_ND[rows], weight_VD, bias_V, logits_CV)
        logits_CV.sub_(logits_CV.amax(-1, keepdim=True)).div_(temperature)
        parts.append(_top_k_chunk(logits_CV, response_ids_N[rows], k))
    if not parts:
        none_N = weight_VD.new_empty(0, dtype=dtype)
        return TopK(response_ids_N.new_empty(0, k), none_N.new_empty(0, k), none_N, none_N)
    joined = join(parts)
    assert isinstance(joined, TopK)
    return joined


def _top_k_chunk(logits_CV: Tensor, response_ids_C: Tensor, k: int) -> TopK:
    """Of logits whose largest is 0, so that their log-sum-exp has all its digits."""
    log_z_C = logits_CV.logsumexp(-1)
    top_CK, ids_CK = logits_CV.topk(k, dim=-1)
    response_C1 = logits_CV.gather(1, response_ids_C[:, None])
    tail_C = rest(logits_CV, torch.cat([ids_CK, response_ids_C[:, None]], 1)) - log_z_C
    return TopK(ids_CK, top_CK - log_z_C[:, None], response_C1[:, 0] - log_z_C, tail_C)


def rest(logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Log Σ exp of all entries but `ids_CK`, [C]: no difference of numbers close to 1."""
    return logits_CV.scatter(1, ids_CK, ABSENT).logsumexp(-1).clamp(min=ABSENT)
