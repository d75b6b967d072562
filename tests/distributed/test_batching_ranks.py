"""A budget of tokens on two ranks: the gradients of one process and fixed micro-batches."""

from __future__ import annotations

import json

import pytest

from tests.conftest import metrics
from tests.distributed.test_ranks import CONFIG, TORCHRUN, options
from tests.processes import completed, environment
from tests.recipes.test_batching import HYBRID, KEYS


def test_two_ranks_with_a_budget_equal_one_process(train, rows, tmp_path, repo):
    base = [option for option in options(tmp_path, rows) if option != "student=digits_small"]
    base += ["teacher=none", "kd_ratio=0", "train.save_every=null", "train.val_every=null"]
    base += ["train.global_batch_size=6", "data.max_length=90", "doctor=never"]
    layers = f"student.architecture.text_config.layer_types={HYBRID}"
    models = {
        "packed": [*base, "student=digits_qwen3_vl", "train.max_steps=2"],
        # One step: a gated delta rule computes in float32, and Adam makes much of little.
        "token_budget": [*base, "student=digits_small", layers, "train.max_steps=1"],
    }
    two = [
        [*overrides, f"run.name={option}_two", f"batching={option}", "train.micro_batch_size=3"]
        for option, overrides in models.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(two))
    script = repo / "tests" / "distributed" / "recipe_runs.py"
    two = [*TORCHRUN, "--nproc-per-node", "2", script, tmp_path / "runs.json"]
    done = completed(*two, env=environment(PYTHONPATH=str(repo)))
    assert done.returncode == 0, done.tail()
    for option, overrides in models.items():
        one = train(CONFIG, f"{option}_one", *overrides, "train.micro_batch_size=6")
        run = tmp_path / "runs" / f"{option}_two"
        for key in KEYS:
            assert metrics(run, key) == pytest.approx(metrics(one, key), rel=1e-6), (option, key)
            assert len(metrics(run, key)) == (2 if option == "packed" else 1)
        assert min(metrics(run, "train/micro_batches").values()) > 1
