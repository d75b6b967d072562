"""What there is to say of rollouts, and a warning when they run away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kd.parallel import World
from kd.types import Rollout, Sample

log = logging.getLogger("kd")

NGRAM = 4
WARN_STEPS = 10
"""Steps that the guard takes the mean of, at the beginning and now."""


def repeated_ngrams(ids: list[int]) -> tuple[int, int]:
    """(n-grams of `ids` that repeat an earlier one, all n-grams), for n = 4."""
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return len(ngrams) - len(set(ngrams)), len(ngrams)


class RolloutStats:
    """Counts of the rows of a step, and of what the last window cost."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.guard = LengthGuard()
        self.waited_s = 0.0
        self._counts: dict[str, int] = {}
        self._made = (0, 0)

    def count(self, rows: Sequence[Sample | Rollout], step: int) -> None:
        """The rows of one optimizer step on this rank."""
        rollouts = [row for row in rows if isinstance(row, Rollout)]
        own = [rollout for rollout in rollouts if rollout.policy == "student"]
        ngrams = [repeated_ngrams(rollout.response_ids) for rollout in rollouts]
        self._counts = {
            "rows": len(rows),
            "rollouts": len(rollouts),
            "own": len(own),
            "tokens": sum(len(rollout.response_ids) for rollout in rollouts),
            "eos": sum(rollout.finished for rollout in rollouts),
            "empty": sum(not rollout.response_ids for rollout in rollouts),
            "repeated": sum(repeated for repeated, _ in ngrams),
            "ngrams": sum(all_ for _, all_ in ngrams),
            "staleness": sum(step - rollout.policy_step for rollout in own),
        }

    def generated(self, tokens: int, seconds: float) -> None:
        """A window of this rank, which the next `metrics` tell of."""
        self._made = tokens, round(seconds * 1e6)

    def metrics(self) -> dict[str, float]:
        """`rollout/…` of the step over all ranks. Collective."""
        *counts, tokens, microseconds = self.world.sum_ints(*self._counts.values(), *self._made)
        c = dict(zip(self._counts, counts, strict=True))
        metrics = {
            "rollout/on_policy": c["own"] / max(1, c["rows"]),
            "rollout/empty": c["empty"],
            "train/rollout_s": self.waited_s,
        }
        self._made = (0, 0)
        if tokens:
            metrics["rollout/tokens_per_s"] = tokens / (microseconds / self.world.size / 1e6)
        if c["own"]:
            metrics["rollout/staleness"] = c["staleness"] / c["own"]
        if c["rollouts"]:
            metrics |= {
                "rollout/length_mean": c["tokens"] / c["rollouts"],
                "rollout/truncated": 1 - c["eos"] / c["rollouts"],
                "rollout/eos": c["eos"] / c["rollouts"],
                "rollout/repetition": c["repeated"] / max(1, c["ngrams"]),
            }
            warning = self.guard.check(metrics["rollout/length_mean"], metrics["rollout/truncated"])
            if warning and self.world.is_main:
                log.warning(warning)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What the guard has seen."""
        return {"first": self.guard.first, "recent": self.guard.recent, "told": self.guard.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self.guard.first = state["first"]
        self.guard.recent = state["recent"]
        self.guard.told = state["told"]


class LengthGuard:
    """Notices responses that get longer and longer, or are mostly cut: each is told of once."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.recent: list[list[float]] = []
        self.told: list[str] = []

    def check(self, length: float, truncated: float) -> str | None:
        """A warning, if a step with these means calls for one."""
        if len(self.first) < WARN_STEPS:
            self.first.append(length)
        self.recent = [*self.recent, [length, truncated]][-WARN_STEPS:]
        if len(self.recent) < WARN_STEPS:
            return None
        begin = sum(self.first) / WARN_STEPS
        length, truncated = (sum(x) / WARN_STEPS for x in zip(*self.recent, strict=True))
        if length > 2 * begin and "length" not in self.told:
            self.told.append("length")
            return (
                f"rollouts run away: {length:.0f} tokens on average over the last {WARN_STEPS} "
                f"steps, {begin:.0f} at the beginning; a lower learning rate, more off-policy rows "
                "(rollout=mixed) or a lower sampling temperature hold them"
            )
        if truncated > 0.5 and "truncated" not in self.told:
            self.told.append("truncated")
            return (
                f"{truncated:.0%} of the rollouts are cut at rollout.sampling.max_new_tokens: the "
                "student does not learn from them to end; raise it, or train the student first"
            )
        return None
