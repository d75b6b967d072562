"""What was trained on, for people to look at: responses and where the teacher disagrees."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.logger import RolloutRecord
from kd.types import Batch, Rollout
from kd.validation import question


def rollout_records(
    trained: list[tuple[Batch, Tensor]], tokenizer: PreTrainedTokenizerBase, step: int, limit: int
) -> list[RolloutRecord]:
    """The first `limit` responses of a step's micro-batches, each with its divergences [N].

    One host sync per micro-batch that is shown. `step` is the number of steps done before it.
    """
    records: list[RolloutRecord] = []
    for batch, kd_N in trained:
        if len(records) >= limit:
            break
        kd_of_rollouts = kd_N.cpu().split(batch.targets_by_rollout)
        for rollout, kd in zip(batch.rollouts, kd_of_rollouts, strict=True):
            records.append(_record(rollout, kd.tolist(), tokenizer, step))
    return records[:limit]


def _record(
    rollout: Rollout, divergence: list[float], tokenizer: PreTrainedTokenizerBase, step: int
) -> RolloutRecord:
    sample = rollout.sample
    return RolloutRecord(
        id=sample.id,
        kind=sample.kind,
        question=question(sample),
        answer=sample.answer,
        policy=rollout.policy,
        tokens=[str(tokenizer.decode([token])) for token in rollout.response_ids],
        divergence=divergence,
        finished=rollout.finished,
        staleness=step - rollout.policy_step if rollout.policy == "student" else 0,
        images=sample.images,
    )
