from __future__ import annotations

import functools
import json

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from kd.rundir import differences
from tests.conftest import metrics

SWEEP = [
    "student=digits_small",
    "train.max_steps=2",
    "train.micro_batch_size=2",
    "train.log_every=1",
    "train.val_every=null",
    "optim.warmup_steps=0",
    "logger=jsonl",
    "parallel.cpu_threads=1",
]


def test_sweep_gives_each_point_a_directory_and_ends_with_a_table(kd_main, tmp_path, capsys):
    lrs = "optim.lr=0.001,0.01"
    kd_main("-m", "--config-name", "digits_teacher", f"run.dir={tmp_path}", *SWEEP, lrs)
    folder = tmp_path / "digits_teacher_sweep"
    points = {path.name: path for path in folder.iterdir() if path.is_dir()}
    assert set(points) == {"optim.lr=0.001", "optim.lr=0.01"}
    first, second = (metrics(path, "train/loss") for path in points.values())
    assert first[1] == second[1]
    assert first[2] != second[2]
    table = capsys.readouterr().out
    assert "finished" in table
    assert table.index("0.001") < table.rindex("0.01")


def test_a_failed_point_does_not_end_the_sweep(kd_main, tmp_path, capsys):
    ratios = "optim.schedule=nonsense,constant"
    with pytest.raises(SystemExit) as exit_:
        kd_main("-m", "--config-name", "digits_teacher", f"run.dir={tmp_path}", *SWEEP, ratios)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "optim.schedule=nonsense: use one of cosine, linear, constant" in error
    assert "points of the sweep that failed: optim.schedule=nonsense" in error
    good = tmp_path / "digits_teacher_sweep" / "optim.schedule=constant"
    assert json.loads((good / "status.json").read_text())["status"] == "finished"


def test_bf16_compute_with_a_teacher_kept_on_the_host(train):
    teacher = train("digits_teacher", "teacher", "student=digits_small") / "export"
    options = [f"teacher.name={teacher}", "teacher.dtype=bfloat16"]
    exact = train("digits_kd", "exact", *options)
    rounded = train(
        "digits_kd",
        "rounded",
        *options,
        "teacher.cpu_offload=true",
        "parallel=bf16",
        "parallel.cpu_threads=1",
    )
    losses = metrics(rounded, "train/loss")
    assert losses == pytest.approx(metrics(exact, "train/loss"), rel=0.03)
    assert losses != metrics(exact, "train/loss")


def test_what_is_trained_in_host_memory(train):
    """The same numbers; FSDP2 keeps and moves the shards its own way."""
    exact = ["student=digits_small", "parallel.compute_dtype=float64"]
    on_device = train("digits_teacher", "device", *exact)
    on_host = train("digits_teacher", "host", *exact, "parallel.cpu_offload=true")
    for key in ("train/loss", "train/grad_norm"):
        assert metrics(on_host, key) == pytest.approx(metrics(on_device, key), rel=1e-6)


def test_compiled_blocks(train, monkeypatch):
    """Traced and differentiated as ever; kernels are not generated, which takes half a minute."""
    options = ["student=digits_qwen3_vl", "train.max_steps=1", "optim.warmup_steps=0"]
    options += ["parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"]
    plain = train("digits_teacher", "plain", *options)
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compiled = train("digits_teacher", "compiled", *options, "parallel.compile=true")
    assert traced
    for key in ("train/loss", "train/grad_norm"):
        assert metrics(compiled, key) == pytest.approx(metrics(plain, key), rel=1e-6)


def test_other_parallelism_is_refused(train, capsys):
    with pytest.raises(SystemExit):
        train("digits_teacher", "tensor", "parallel.tp_size=2")
    assert "no tensor or pipeline parallelism" in capsys.readouterr().err


def test_a_run_may_resume_with_other_workers_also_of_the_parts_of_a_mixture():
    """Their default was another once."""
    before = {"data.num_workers": 2, "data.datasets.mine.num_workers": 0, "data.max_length": 9}
    now = {"data.num_workers": None, "data.datasets.mine.num_workers": None, "data.max_length": 9}
    assert differences(before, now) == []
    assert differences(before, now | {"data.max_length": 8}) == ["data.max_length: 9 -> 8"]
    other = {"data.datasets.mine.path": "b"}
    assert differences({"data.datasets.mine.path": "a"}, other) == [
        "data.datasets.mine.path: a -> b"
    ]
