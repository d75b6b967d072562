"""How far what is kept of a teacher is from what it said.

Shape legend: N response tokens, C of them in a chunk, D hidden, V vocabulary, K the top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd.teacher.base import Head
from kd.teacher.payload import ABSENT, CHUNK_ROWS, Hidden, Payload, TopK


def divergence(
    exact: Payload, decoded: Payload, response_ids_N: Tensor, head: Head | None
) -> Tensor:
    """KL(exact || decoded) of each token [N], on the CPU: of hidden states over the whole
    vocabulary, of top-k on its buckets.
    """
    if isinstance(exact, TopK) and isinstance(decoded, TopK):
        exact_logp, decoded_logp = (buckets(top, response_ids_N) for top in (exact, decoded))
        return _kl(exact_logp.log_softmax(-1), decoded_logp.log_softmax(-1)).cpu()
    assert isinstance(exact, Hidden) and isinstance(decoded, Hidden) and head is not None
    chunks = (payload.hidden_ND.split(CHUNK_ROWS) for payload in (exact, decoded))
    kl = [_kl(_logp(a, head), _logp(b, head)).cpu() for a, b in zip(*chunks, strict=True)]
    return torch.cat(kl)


def _logp(hidden_CD: Tensor, head: Head) -> Tensor:
    hidden_CD = hidden_CD.to(head.weight_VD.device, head.weight_VD.dtype)
    logits_CV = torch.nn.functional.linear(hidden_CD, head.weight_VD, head.bias_V)
    return logits_CV.double().log_softmax(-1)


def buckets(top: TopK, response_ids_N: Tensor) -> Tensor:
    """Log-probs [N, K + 2] of a distribution: the k in the order of their ids, the response's own
    token unless it is among them, and the tail; float64, on the CPU.
    """
    ids_NK, order_NK = top.ids_NK.cpu().sort(-1)
    logp_NK = top.logp_NK.cpu().double().gather(1, order_NK)
    is_among_N1 = ((ids_NK == response_ids_N[:, None]) & (logp_NK > ABSENT / 2)).any(1, True)
    response_N1 = top.response_logp_N.cpu().double()[:, None].masked_fill(is_among_N1, ABSENT)
    return torch.cat([logp_NK, response_N1, top.tail_N.cpu().double()[:, None]], 1)


def _kl(exact_logp: Tensor, decoded_logp: Tensor) -> Tensor:
    return (exact_logp.exp() * (exact_logp - decoded_logp)).sum(-1)
