"""However the rows of a step are divided: the same gradients, from data sets and from rollouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import metrics

KEYS = ("train/loss", "train/ce", "train/kd", "train/grad_norm", "train/num_targets")
HYBRID = "[linear_attention,full_attention,full_attention]"
BASE = [
    *("train.global_batch_size=6", "train.micro_batch_size=3", "train.max_steps=2"),
    *("doctor=never", "optim.warmup_steps=0"),
    *("data.max_length=100", "data.kinds=[which,count,add]"),
    *("parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"),
]


@pytest.fixture
def teacher(train) -> list[str]:
    """Overrides that name one of the students' tokenizer, random."""
    options = ["student=digits_qwen3_vl", "student.seed=7", "train.max_steps=1"]
    options += ["doctor=never", "optim.warmup_steps=0", "data.kinds=[which,count,add]"]
    run = train("digits_teacher", "teacher", *options)
    return [f"teacher.name={run / 'export'}", "teacher.dtype=float32"]


def check_equal(run: Path, other: Path) -> None:
    for key in KEYS:
        assert metrics(run, key) == pytest.approx(metrics(other, key), rel=1e-6), key


def test_packed_and_padded_steps_have_the_gradients_of_fixed_ones(train, teacher):
    base = [*BASE, *teacher, "student=digits_qwen3_vl", "train.save_every=1"]
    fixed = train("digits_kd", "fixed", *base)
    waste = metrics(fixed, "data/padding_waste")
    for option, workers in {"token_budget": 0, "packed": 1}.items():
        more = [f"batching={option}", f"data.num_workers={workers}"]
        run = train("digits_kd", option, *base, *more)
        check_equal(run, fixed)
        less = metrics(run, "data/padding_waste")
        assert all(less[step] < waste[step] / 2 for step in waste), (option, less, waste)
        assert min(metrics(run, "train/micro_batches").values()) > 2, "100 tokens at once"
    assert set(less.values()) == {0.0}

    # Stopped after one step, and gone on with another budget: the same run.
    few = metrics(run, "train/micro_batches")[2]
    shutil.rmtree(run / "checkpoints" / "step_000002")
    train("digits_kd", "packed", *base, "batching=packed", "batching.max_tokens=250")
    check_equal(run, fixed)
    assert metrics(run, "train/micro_batches")[2] < few

    # Rollouts: their lengths are known when they are there.
    base += ["rollout=student", "kd_ratio=1", "rollout.num_generations=3", "train.max_steps=1"]
    base += ["rollout.sampling.max_new_tokens=9"]
    fixed = train("digits_kd", "rollouts_fixed", *base)
    run = train("digits_kd", "rollouts_packed", *base, "batching=packed")
    check_equal(run, fixed)
    assert metrics(run, "train/micro_batches")[1] > 2


def test_rows_of_a_gated_delta_net_share_a_budget_but_no_sequence(train, capfd):
    layers = f"student.architecture.text_config.layer_types={HYBRID}"
    base = [*BASE, "student=digits_small", layers, "teacher=none", "kd_ratio=0"]
    base += ["train.max_steps=1"]
    fixed = train("digits_kd", "fixed", *base)
    run = train("digits_kd", "budget", *base, "batching=token_budget")
    check_equal(run, fixed)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train("digits_kd", "packed", *base, "batching=packed")
    assert exit_.value.code == 2
    error = capfd.readouterr().err
    assert "batching=packed: the student reads a row otherwise where another comes before" in error
    assert "Choose batching=token_budget" in error
