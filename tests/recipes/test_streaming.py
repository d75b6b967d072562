"""Training on rows that are fetched as they are needed: the run that it is from rows on disk."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.data import DigitsConfig
from kd.types import Sample
from tests.conftest import metrics

BASE = ["data=conversations", "student=digits_small", "teacher=none", "kd_ratio=0",
        "parallel=fsdp", "parallel.cpu_threads=1", "doctor=never", "logger=jsonl",
        "validation.max_new_tokens=3", "optim.warmup_steps=0",
        "train.global_batch_size=null", "train.micro_batch_size=4"]  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 questions about digits with their images, in row groups of 4, and 5 to validate on."""
    for split, count in {"train": 24, "validation": 5}.items():
        rows = DigitsConfig(num_images=20, kinds=["which", "parity"], val_samples=5).build(split)
        table = pa.Table.from_pylist([as_row(rows[i]) for i in range(count)])
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=4)
    return tmp_path


def as_row(sample: object) -> dict:
    assert isinstance(sample, Sample)
    files = [io.BytesIO() for _ in sample.images]
    for image, file in zip(sample.images, files, strict=True):
        image.save(file, "PNG")
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
    return {"messages": [*sample.messages, answer], "images": [f.getvalue() for f in files]}


def options(shards: Path, *more: str) -> list[str]:
    paths = [
        f"data.path={shards}/train.parquet",
        f"data.validation_path={shards}/validation.parquet",
    ]
    return [*BASE, *paths, "data.val_samples=3", "train.val_every=2", *more]


def streaming(shards: Path) -> list[str]:
    return ["data.streaming=true", "data.shuffle_rows=8", f"data.cache_folder={shards}/cache"]


@pytest.mark.parametrize("how", ["token_budget", "rollouts"])
def test_rows_in_order_give_the_run_that_rows_on_disk_give(train, shards, how):
    more = {
        "token_budget": ["batching=token_budget", "batching.max_tokens=200", "data.max_length=200",
                         "data.num_workers=1"],
        "rollouts": ["rollout=mixed", "kd_ratio=0.5", "student.seed=7", "rollout.num_generations=2",
                     "rollout.sampling.max_new_tokens=4", "train.grad_accum=2"],
    }[how]  # fmt: skip
    if how == "rollouts":
        first = train("qwen_vl_kd", "teacher", *options(shards, "train.max_steps=1"), fast=False)
        more += ["teacher=local", f"teacher.name={first / 'export'}", "teacher.dtype=float32"]
    given = options(shards, "data.shuffle=false", "train.max_steps=2", *more)
    disk = train("qwen_vl_kd", "disk", *given, fast=False)
    streamed = train("qwen_vl_kd", "streamed", *given, *streaming(shards), fast=False)
    for key in ("train/loss", "train/grad_norm", "train/num_targets"):
        assert metrics(streamed, key) == metrics(disk, key), key
        assert len(metrics(disk, key)) == 2
    assert metrics(streamed, "val/rows") == {2: 3}


def test_resume_equals_never_having_stopped(train, shards, tmp_path):
    given = options(shards, *streaming(shards), "train.max_steps=8", "train.save_every=3")
    whole = train("qwen_vl_kd", "whole", *given, fast=False)
    half = tmp_path / "runs" / "half"
    shutil.copytree(whole, half)
    for step in ("step_000006", "step_000008"):
        shutil.rmtree(half / "checkpoints" / step, ignore_errors=True)
    config = half / "config.yaml"
    config.write_text(config.read_text().replace("name: whole", "name: half"))
    shutil.rmtree(shards / "cache")  # on another machine, say
    train("qwen_vl_kd", "half", *given, fast=False)
    assert metrics(half, "train/loss") == metrics(whole, "train/loss")
    assert len(metrics(half, "train/loss")) == 8
