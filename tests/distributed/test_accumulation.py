"""Gradients are the same whenever they are reduced: on 1, 2 and 4 ranks, in one copy or two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kd.parallel import ParallelConfig
from tests.dflash.conftest import build, save
from tests.distributed.gradient_runs import STEPS, gradients, recipe
from tests.distributed.test_ranks import CONFIG, TORCHRUN, options
from tests.model.families import write
from tests.processes import completed, environment

VALUES = ("auto", "true", "false")
ROWS = 12
Run = tuple[str, str, list[str]]


@pytest.fixture
def base(tmp_path, rows) -> list[str]:
    """Student and teacher, on rows of no, one or two images."""
    write("qwen3_vl", tmp_path / "student", seed=0)
    write("qwen3_vl", tmp_path / "teacher", seed=1)
    whole = [option for option in options(tmp_path, rows) if "global_batch" not in option]
    whole[whole.index("student=digits_small")] = "student=pretrained"
    return [
        *whole,
        *("run.name=none", f"train.global_batch_size={ROWS}", "train.max_grad_norm=1e9"),
        *("teacher=local", "teacher.dtype=float32"),
        *(f"student.name={tmp_path / 'student'}", f"teacher.name={tmp_path / 'teacher'}"),
    ]


@pytest.fixture
def draft(tmp_path, rows) -> list[str]:
    target = save(build("hybrid"), tmp_path / "target")
    return [
        *(f"run.dir={tmp_path / 'runs'}", "run.name=none", f"target.name={target}"),
        *("data=conversations", f"data.path={rows}", "data.val_fraction=0.25", "rollout=dataset"),
        *("data.num_workers=0", "data.val_samples=null", "train.val_every=null"),
        *("draft.target_layer_ids=[0,2]", "draft.block_size=4", "draft.num_anchors=3"),
        *(f"train.global_batch_size={ROWS}", "train.max_grad_norm=1e9", "optim.warmup_steps=1"),
        *("parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"),
        "parallel.cpu_threads=1",
    ]


def alone(config: str, overrides: list[str]) -> dict:
    """In this process."""
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    try:
        return gradients(recipe(config, overrides, world))
    finally:
        world.close()


def on_ranks(
    runs: list[Run], count: int, folder: Path, repo: Path, nodes: int = 1
) -> dict[str, dict]:
    """By the runs' names."""
    (folder / "runs.json").write_text(json.dumps(runs))
    script = repo / "tests" / "distributed" / "gradient_runs.py"
    command = [*TORCHRUN, "--nproc-per-node", count, script, folder / "runs.json", folder, nodes]
    done = completed(*command, env=environment(PYTHONPATH=str(repo)))
    assert done.returncode == 0, done.tail()
    return {name: torch.load(folder / f"{name}.pt") for name, *_ in runs}


def check_equal(found: dict, expected: dict, name: str) -> None:
    for step in range(STEPS):
        ours, theirs = found["steps"][step], expected["steps"][step]
        assert ours.keys() == theirs.keys(), name
        for key, grad in theirs.items():
            error = (ours[key] - grad).abs().max() / grad.abs().max().clamp(min=1e-12)
            assert error < 2e-6, (name, step, key, float(error))


def runs_of(config: str, base: list[str], **layouts: list[str]) -> list[Run]:
    return [
        (f"{layout}_{value}", config, [*base, *more, f"parallel.sync_every_micro_batch={value}"])
        for layout, more in layouts.items()
        for value in VALUES
    ]


ONE_ROW = ["train.micro_batch_size=1"]
COPIES = [*ONE_ROW, "parallel.dp_replicate=2"]


def test_one_rank(base):
    whole = alone(CONFIG, [*base, f"train.micro_batch_size={ROWS}"])
    for name, config, overrides in runs_of(CONFIG, base, one=["train.micro_batch_size=3"]):
        found = alone(config, overrides)
        assert found["every"] == (not name.endswith("false"))
        check_equal(found, whole, name)


def test_ranks_and_copies(base, tmp_path, repo):
    whole = alone(CONFIG, [*base, f"train.micro_batch_size={ROWS}"])
    sums = [abs(grad).sum() for grad in whole["steps"][-1].values()]
    assert len(sums) > 30 and min(sums) > 0, "a gradient of zeros would be equal to any other"
    runs = runs_of(CONFIG, base, sharded=ONE_ROW, copies=COPIES)
    away = [*base, "teacher.offload=true"]
    runs += [("sharded_away", CONFIG, [*away, *ONE_ROW]), ("copies_away", CONFIG, [*away, *COPIES])]
    found = on_ranks(runs, 2, tmp_path, repo)
    for name, run in found.items():
        check_equal(run, whole, name)
    # Six micro-batches, and every group of FSDP2 is reduced in each.
    scattered = {name: count(run, "reduce_scatter") for name, run in found.items()}
    groups = scattered["sharded_false"]
    assert groups > 4
    assert scattered["sharded_auto"] == scattered["sharded_true"] == 6 * groups
    between = {name: count(run, "allreduce") for name, run in found.items()}
    assert between["copies_false"] >= groups
    assert between["copies_true"] == between["copies_auto"] == between["copies_false"]


def count(run: dict, name: str) -> int:
    return sum(number for op, number in run["collectives"].items() if name in op)


def test_copies_that_are_sharded(base, tmp_path, repo):
    whole = alone(CONFIG, [*base, f"train.micro_batch_size={ROWS}"])
    runs = [run for run in runs_of(CONFIG, base, copies=COPIES) if "auto" not in run[0]]
    for name, run in on_ranks(runs, 4, tmp_path, repo).items():
        check_equal(run, whole, name)


def test_a_teacher_that_is_away_between_its_uses(base):
    """Alone: as it is, and under FSDP2, which casts its weights; one host copy that stays."""
    for dtype in ("float32", "float64"):
        precision = [f"parallel.compute_dtype={dtype}", f"parallel.reduce_dtype={dtype}"]
        whole = [*base, "train.micro_batch_size=4", *precision]
        beside = alone(CONFIG, whole)
        check_equal(alone(CONFIG, [*whole, "teacher.offload=true"]), beside, dtype)


def test_a_draft(draft, tmp_path, repo):
    whole = alone("dflash", [*draft, f"train.micro_batch_size={ROWS}"])
    runs = runs_of("dflash", draft, sharded=ONE_ROW)
    runs += runs_of("dflash", draft, copies=COPIES)[:2]
    # As on two machines: there `auto` is once per step, without a GPU that is too small for it.
    for name, run in on_ranks(runs, 2, tmp_path, repo, nodes=2).items():
        check_equal(run, whole, name)
        assert run["every"] == name.endswith("true")
