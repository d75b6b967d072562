"""What is said of rollouts, and when a warning is due."""

from __future__ import annotations

import logging

import pytest

from kd.parallel import ParallelConfig
from kd.rollout.stats import WARN_STEPS, LengthGuard, RolloutStats, repeated_ngrams
from kd.types import Rollout, Sample

SAMPLE = Sample("a", [], [], None)


@pytest.fixture
def world():
    made = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield made
    made.close()


def test_repetition_counts_four_grams_seen_before():
    assert repeated_ngrams([1, 2, 3]) == (0, 0)
    assert repeated_ngrams([1, 2, 3, 4, 5]) == (0, 2)
    assert repeated_ngrams([7] * 8) == (4, 5)
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == (1, 5)


def test_metrics_of_a_step(world):
    stats = RolloutStats(world)
    stats.waited_s = 0.5
    stats.generated(120, 2.0)
    rows = [
        Rollout(SAMPLE, [7] * 8, True, policy_step=3),
        Rollout(SAMPLE, [1, 2, 3, 4], False, policy_step=5),
        Rollout(SAMPLE, [], False, policy_step=5),
        Rollout(SAMPLE, [5, 6], True, 0, policy="teacher"),
        SAMPLE,
    ]
    stats.count(rows, step=5)
    assert stats.metrics() == pytest.approx(
        {
            "rollout/on_policy": 3 / 5,
            "rollout/empty": 1,
            "train/rollout_s": 0.5,
            "rollout/tokens_per_s": 60,
            "rollout/staleness": 2 / 3,  # the teacher's is of no age
            "rollout/length_mean": 14 / 4,
            "rollout/truncated": 2 / 4,
            "rollout/eos": 2 / 4,
            "rollout/repetition": 4 / 6,
        }
    )
    stats.count([SAMPLE], step=6)
    assert set(stats.metrics()) == {"rollout/on_policy", "rollout/empty", "train/rollout_s"}


def test_lengths_that_run_away_are_told_of_once(world, caplog):
    stats = RolloutStats(world)
    lengths = [10] * WARN_STEPS + [30] * (2 * WARN_STEPS)
    with caplog.at_level(logging.WARNING):
        for step, length in enumerate(lengths):
            stats.count([Rollout(SAMPLE, [1] * length, True, step)], step)
            stats.metrics()
            if step == WARN_STEPS:
                again = RolloutStats(world)
                again.load_state_dict(stats.state_dict())
                stats = again
    (record,) = caplog.records
    assert "rollouts run away: " in record.getMessage() and "10 at the beg" in record.getMessage()


def test_a_guard_keeps_quiet_where_nothing_runs_away_and_tells_of_cut_responses():
    guard = LengthGuard()
    assert not any(guard.check(10 + step % 3, 0.3) for step in range(50))
    told = [guard.check(12, 0.9) for _ in range(20)]
    assert sum(warning is not None for warning in told) == 1
    assert "are cut at rollout.sampling.max_new_tokens" in next(filter(None, told))
