"""The draft's recipe on two ranks: the numbers of one process, and a run that changes its ranks."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.conftest import metrics
from tests.dflash.conftest import build, save
from tests.distributed.test_ranks import ranks

KEYS = ("train/loss", "train/grad_norm", "train/accept_length", "train/num_blocks", "val/loss")


def test_ranks_equal_one_process(train, rows, tmp_path):
    """Rows have no, one or two images: a rank may see none. The target responds, sharded."""
    target = save(build("hybrid"), tmp_path / "target")
    base = [
        *(f"run.dir={tmp_path / 'runs'}", "logger=jsonl", f"target.name={target}"),
        *("data=conversations", f"data.path={rows}", "data.val_fraction=0.25"),
        *("data.num_workers=0", "data.val_samples=null", "rollout.sampling.max_new_tokens=7"),
        *("draft.target_layer_ids=[0,2]", "draft.block_size=4", "draft.num_anchors=3"),
        *("train.global_batch_size=4", "train.max_steps=4", "train.save_every=2"),
        "train.log_every=1",
        *("train.val_every=2", "validation.max_new_tokens=7", "validation.batch_size=2"),
        *("checkpoint.keep_last=9", "optim.warmup_steps=1", "parallel.cpu_threads=1"),
        *("parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"),
    ]
    one = train("dflash", "one", *base, "train.micro_batch_size=2")
    ranks("two", *base, "train.micro_batch_size=1", "parallel.nproc=2", config="dflash")
    two = tmp_path / "runs" / "two"
    for key in KEYS:
        assert len(metrics(one, key)) in (2, 4)
        assert metrics(two, key) == pytest.approx(metrics(one, key), rel=1e-6), key
    for key in metrics_named(one, "val/accept"):
        assert metrics(two, key) == pytest.approx(metrics(one, key), rel=1e-12), key
    # The first half on two ranks, the second on one.
    half = tmp_path / "runs" / "half"
    shutil.copytree(two, half)
    shutil.rmtree(half / "checkpoints" / "step_000004")
    config = (half / "config.yaml").read_text()
    changed = config.replace("name: two", "name: half").replace("nproc: 2", "nproc: 1")
    (half / "config.yaml").write_text(changed)
    train("dflash", "half", *base, "train.micro_batch_size=1")
    for key in KEYS:
        assert metrics(half, key) == pytest.approx(metrics(one, key), rel=1e-6), key


def metrics_named(run, prefix: str) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = sorted({key for line in lines for key in json.loads(line) if key.startswith(prefix)})
    assert len(found) > 3
    return found
