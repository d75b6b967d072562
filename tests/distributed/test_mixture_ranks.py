"""Losses by data set on two ranks of one row each, so that neither has both: those of one rank."""

from __future__ import annotations

import json

import pytest

from tests.conftest import metrics
from tests.distributed.test_ranks import CONFIG, TORCHRUN
from tests.processes import completed, environment
from tests.recipes.test_mixtures import EXACT, MIX, MIXED, OTHERS, PER_DATA_SET, STUDENT

KEYS = ("train/loss", "train/ce", "train/kd", "val/loss")


def test_two_ranks_equal_one_process(train, tmp_path, repo):
    short = ["train.max_steps=4", "train.val_every=4", "validation.generate=false",
             "train.global_batch_size=2"]  # fmt: skip
    one = ["optim.warmup_steps=0", "train.max_steps=1", "student.seed=7"]
    teacher = train(CONFIG, "teacher", *STUDENT, *MIXED, *MIX, *one, fast=False) / "export"
    base = [*EXACT, *MIX, *short, "teacher=local", f"teacher.name={teacher}"]
    base += OTHERS
    two = [*base, f"run.dir={tmp_path / 'runs'}", "run.name=two", "logger=jsonl"]
    (tmp_path / "runs.json").write_text(json.dumps([[*two, "train.micro_batch_size=1"]]))
    script = repo / "tests" / "distributed" / "recipe_runs.py"
    two = [*TORCHRUN, "--nproc-per-node", "2", script, tmp_path / "runs.json"]
    done = completed(*two, env=environment(PYTHONPATH=str(repo)))
    assert done.returncode == 0, done.tail()
    parts = [key + name for key in (*PER_DATA_SET, "val/loss_") for name in ("pictures", "words")]
    run = train(CONFIG, "one", *base, "train.micro_batch_size=2", fast=False)
    for key in (*KEYS, *parts):
        got = metrics(tmp_path / "runs" / "two", key)
        assert got == pytest.approx(metrics(run, key), rel=1e-6), key
        assert got, key
    seen = [len(metrics(run, f"train/ce_{name}")) for name in ("pictures", "words")]
    assert sum(seen) > 4 > min(seen), "a step with both, and one without"
