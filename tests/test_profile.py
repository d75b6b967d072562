from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.parallel import ParallelConfig
from kd.profile import Profiler, breakdown
from tests.conftest import metrics

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm")
PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication", "rest")


def table(run_dir: Path) -> dict[str, float]:
    """Milliseconds by name, of `profile.txt`."""
    lines = (run_dir / "profile.txt").read_text().splitlines()
    cells = [line.split() for line in lines]
    return {words[0]: float(words[1]) for words in cells if len(words) == 3 and words[1] != "ms"}


def test_a_profiled_run_is_the_same_run(train):
    few = ["data.num_images=40", "train.micro_batch_size=2", "train.grad_accum=2", "doctor=never"]
    one = ["train.max_steps=1", "optim.warmup_steps=0"]
    teacher = train("digits_teacher", "teacher", "student=digits_small", *few, *one)
    few += [f"teacher.name={teacher / 'export'}", "train.max_steps=4"]
    plain = train("digits_kd", "plain", *few)
    run = train("digits_kd", "profiled", *few, "profile=true", "profile_steps=[2,3]")
    for key in LOSSES:
        assert metrics(run, key) == metrics(plain, key), key  # bit for bit
    assert not (plain / "profile.txt").exists() and not (plain / "trace.json.gz").exists()

    parts = table(run)
    assert [name for name in parts if name in PARTS] == list(PARTS)
    assert sum(parts[name] for name in PARTS) == pytest.approx(parts["step"], abs=1)
    # Measured by the clock just around what is profiled, which others' work may lengthen.
    for name in ("step", "data"):
        seconds = metrics(run, f"train/{name}_s")
        measured = 500 * (seconds[2] + seconds[3])
        assert measured / 2 < parts[name] < measured * 1.001 + 0.1, name
    for name in ("data", "teacher", "student", "loss", "backward", "optimizer"):
        assert parts[name] > 0, name
    assert parts["student"] > parts["loss"], "the loss is not counted twice"
    assert parts["aten::mm"] > 0
    with gzip.open(run / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("kd::step") == 2 and names.count("kd::backward") == 4


def test_a_recording_that_breaks_off_leaves_room_for_the_next(tmp_path, capsys, caplog):
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    try:
        for at in (1, 2):  # while it warms up, and while it records
            profiler = Profiler(True, [2, 3], tmp_path, world, done=0)
            with pytest.raises(KeyError):
                for step in range(1, at + 1):
                    with profiler(step), torch.profiler.record_function("kd::step"):
                        if step == at:
                            raise KeyError
            profiler.close()
            assert not list(tmp_path.iterdir())
        profiler = Profiler(True, [2, 3], tmp_path, world, done=2)
        with profiler(3):
            pass
        assert "nothing is recorded, as the run goes on after step 2" in caplog.text
        assert not list(tmp_path.iterdir())
        profiler = Profiler(True, [1, 1], tmp_path, world, done=0)
        with profiler(1), torch.profiler.record_function("kd::step"):
            torch.ones(9).sum()
    finally:
        world.close()
    assert "steps 1 to 1, rank 0 of 1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json.gz", "profile.txt"}


def event(cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> dict:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start,
        "dur": end - start,
        "tid": tid,
        "args": {key.replace("_", " "): value for key, value in args.items()},
    }


def launch(number: int, name: str, issued: float, start: float, end: float, tid: int = 1) -> list:
    """An operator, its launch and its kernel, as CUPTI reports them."""
    kernel = name if name.startswith("nccl") else f"kernel of {name}"
    return [
        event("cpu_op", name, issued - 1, issued + 1, tid, External_id=number),
        event("cuda_runtime", "cudaLaunchKernel", issued, issued + 1, tid, correlation=number),
        event("kernel", kernel, start, end, 7, correlation=number, External_id=number),
    ]


def test_time_of_a_gpu_is_that_of_what_it_was_told_to_do():
    """By a trace made by hand: kernels run later than they were launched, and at once."""
    found = breakdown(
        [
            event("user_annotation", "kd::step", 0, 60),
            event("user_annotation", "kd::data", 0, 20),
            event("user_annotation", "kd::student", 20, 40),
            event("user_annotation", "kd::loss", 35, 40),
            event("user_annotation", "kd::backward", 40, 50),
            event("gpu_user_annotation", "kd::student", 25, 60, 7),
            *launch(1, "aten::mm", 22, 25, 45),
            *launch(2, "nccl:all_gather", 23, 30, 55),  # 10 of it while nothing else runs
            *launch(3, "aten::exp", 36, 55, 60),
            *launch(4, "aten::mm", 45, 62, 90, tid=2),  # by the thread of the backward
            *launch(5, "aten::mm", 95, 95, 99),  # between two steps
        ]
    )
    assert found.on_device and found.steps == 1
    expected = {"data": 20, "student": 25, "loss": 5, "backward": 28, "communication": 10}
    assert found.parts == expected | {"rest": 0}  # 60 to 62: idle, and no host in the step
    assert (found.idle, found.collectives) == (25, 25)  # 20 for data, 5 until the first kernel
    assert found.operators[0] == ("aten::mm", 48, 2)


def test_gloo_has_the_time_in_which_its_threads_run():
    found = breakdown(
        [
            event("user_annotation", "kd::step", 0, 60),
            event("user_annotation", "kd::student", 10, 40),
            event("user_annotation", "gloo:all_gather", 15, 25, 8),
            event("user_annotation", "gloo:all_gather", 20, 30, 9),
            event("user_annotation", "gloo:all_reduce", 70, 80, 9),
            event("cpu_op", "aten::linear", 30, 40),
            event("cpu_op", "aten::mm", 32, 39),
        ]
    )
    assert found.parts == {"student": 15, "communication": 15, "rest": 30}
    assert found.operators == [("aten::mm", 7, 1), ("aten::linear", 3, 1)]
    assert not found.on_device


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("digits_kd", "profile_steps=[5,7]", "[5, 7], but the run has train.max_steps=6"),
        ("dflash", "profile_steps=[5,7]", "[5, 7], but the run has train.max_steps=6"),
        ("digits_kd", "profile_steps=[4,3]", "give the first and the last step"),
        ("digits_kd", "profile_steps=[0,3]", "give the first and the last step"),
        ("digits_kd", "profile_steps=[3]", "give the first and the last step"),
    ],
)
def test_refusals(train, capsys, config, override, words):
    with pytest.raises(SystemExit) as exit_:
        train(config, "refused", "profile=true", override)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
