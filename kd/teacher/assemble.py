"""Payloads of responses -> targets of a batch."""

from __future__ import annotations

import torch

from kd.align import MatchedVocabulary
from kd.teacher.base import Head
from kd.teacher.payload import Hidden, Payload, TopK, join, tensors
from kd.teacher.sparse import SparseTargets
from kd.types import Batch, TeacherTargets


def assemble(
    payloads: list[Payload],
    batch: Batch,
    *,
    head: Head | None,
    matched: MatchedVocabulary | None,
    vocab: int,
    temperature: float,
    tail: bool = True,
) -> TeacherTargets:
    """Targets on the device of `batch`, of one payload per response of it that has a token.

    `head` on that device, for payloads of hidden states; the rest is for those of log-probs:
    `vocab` entries that they are over, their temperature, and whether the tail is kept.
    """
    device = batch.teacher.input_ids_BS.device
    payload = join(payloads) if payloads else _nothing(head)
    payload = type(payload)(**{k: x.to(device) for k, x in tensors(payload).items()})
    if isinstance(payload, Hidden):
        assert head is not None
        return head.targets(payload.hidden_ND, batch, matched)
    # A target row predicts the token after it.
    response_ids_N = batch.teacher.input_ids_BS.flatten()[batch.teacher.target_rows_N + 1]
    return SparseTargets(payload, response_ids_N, vocab, temperature, tail)


def _nothing(head: Head | None) -> Payload:
    if head is not None:
        return Hidden(head.weight_VD.new_empty(0, head.weight_VD.shape[1]))
    none_N = torch.empty(0)
    return TopK(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1), none_N, none_N)
