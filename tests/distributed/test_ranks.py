"""Real ranks over gloo: the same numbers as one process, on batches that mix images and text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import metrics
from tests.processes import completed, python
from tests.teacher.serving import Server

CONFIG = "qwen_vl_kd"  # its models, data and precision replaced by tiny ones
KEYS = ("train/loss", "train/ce", "train/kd", "train/grad_norm", "val/loss", "val/kd")


PYTHON = python("-m", "kd.run")
TORCHRUN = python("-m", "torch.distributed.run", "--standalone")


def ranks(name: str, *overrides: str, command: list[str] = PYTHON, config: str = CONFIG) -> None:
    """Run on two ranks."""
    done = completed(*command, "--config-name", config, f"run.name={name}", *overrides)
    assert done.returncode == 0, done.tail()


def options(tmp_path: Path, rows: Path) -> list[str]:
    return [
        f"run.dir={tmp_path / 'runs'}",
        "logger=jsonl",
        "student=digits_small",
        "parallel=fsdp",
        "data=conversations",
        f"data.path={rows}",
        "data.num_workers=0",
        "data.val_fraction=0.25",
        "data.val_samples=null",
        "train.global_batch_size=4",
        "train.max_steps=4",
        "train.save_every=2",
        "train.val_every=2",
        "optim.warmup_steps=1",
        "optim.lr=0.003",
        "validation.max_new_tokens=3",
        "validation.batch_size=2",
        "checkpoint.keep_last=9",
        "parallel.cpu_threads=1",
        "parallel.compute_dtype=float64",
        "parallel.reduce_dtype=float64",
    ]


def test_ranks_equal_one_process(train, rows, tmp_path):
    base = options(tmp_path, rows)
    alone = ["teacher=none", "kd_ratio=0"]
    teacher = train(CONFIG, "teacher", *base, *alone, "student.seed=3", "train.micro_batch_size=4")
    base += ["teacher=local", f"teacher.name={teacher / 'export'}"]
    one = train(CONFIG, "one", *base, "train.micro_batch_size=4")
    expected = {key: metrics(one, key) for key in KEYS}

    def check(name: str) -> None:
        for key in KEYS:
            got = metrics(tmp_path / "runs" / name, key)
            assert got == pytest.approx(expected[key], rel=1e-6), (name, key)

    two = ["parallel.nproc=2"]
    profile = ["profile=true", "profile_steps=[2,3]"]
    ranks("sharded", *base, *two, "train.micro_batch_size=1", *profile)
    check("sharded")
    table = (tmp_path / "runs" / "sharded" / "profile.txt").read_text()
    assert "rank 0 of 2" in table
    assert float(re.search(r"communication +([\d.]+)", table)[1]) > 0.5
    for key in ("val/accuracy", "val/rows", "data/dropped_too_long"):
        assert metrics(tmp_path / "runs" / "sharded", key) == metrics(one, key)
    replicated = ["train.micro_batch_size=2", "parallel.dp_replicate=2"]
    torchrun = [*TORCHRUN, "--nproc-per-node", "2", "-m", "kd.run"]
    ranks("replicated", *base, *replicated, command=torchrun)
    check("replicated")

    # Both ways: two ranks go on from one rank's checkpoint, and one from two's.
    checkpoints = tmp_path / "runs" / "one" / "checkpoints"
    shutil.rmtree(checkpoints / "step_000004")
    ranks("one", *base, *two, "train.micro_batch_size=2")
    check("one")
    shutil.rmtree(tmp_path / "runs" / "sharded" / "checkpoints" / "step_000004")
    train(CONFIG, "sharded", *base, "train.micro_batch_size=2")
    check("sharded")


def test_checkpoints_of_one_rank_without_fsdp_are_read_by_two_and_back(train, rows, tmp_path):
    """In one precision, which one rank does not shard for."""
    base = [*options(tmp_path, rows), "teacher=none", "kd_ratio=0"]
    base = [option for option in base if "float64" not in option]
    one = train(CONFIG, "one", *base, "train.micro_batch_size=4")
    expected = {key: metrics(one, key) for key in ("train/loss", "train/grad_norm", "val/loss")}

    def check(name: str) -> None:
        for key in expected:
            got = metrics(tmp_path / "runs" / name, key)
            assert got == pytest.approx(expected[key], rel=1e-5), (name, key)

    two = ["parallel.nproc=2", "train.micro_batch_size=2"]
    ranks("two", *base, *two)
    check("two")
    shutil.rmtree(tmp_path / "runs" / "two" / "checkpoints" / "step_000004")
    train(CONFIG, "two", *base, "train.micro_batch_size=4")
    check("two")
    shutil.rmtree(one / "checkpoints" / "step_000004")
    ranks("one", *base, *two)
    check("one")


ON_POLICY_KEYS = (
    "train/loss",
    "train/ce",
    "train/kd",
    "train/grad_norm",
    "rollout/length_mean",
    "rollout/on_policy",
    "rollout/staleness",
)


def test_on_policy_ranks_equal_one_process(train, rows, tmp_path):
    """The same prompts, draws and responses on one rank and on two, also in mid-window."""
    base = options(tmp_path, rows)
    alone = ["teacher=none", "kd_ratio=0", "train.max_steps=2"]
    teacher = train(CONFIG, "teacher", *base, *alone, "student.seed=3", "train.micro_batch_size=4")
    base += [
        *("teacher=local", f"teacher.name={teacher / 'export'}", "train.val_every=null"),
        *("rollout=student", "kd_ratio=1", "rollout.sampling.max_new_tokens=5"),
        *("rollout.num_generations=2", "rollout.window_steps=4", "train.max_steps=6"),
    ]
    one = train(CONFIG, "one", *base, "train.micro_batch_size=4")
    expected = {key: metrics(one, key) for key in ON_POLICY_KEYS}
    assert len(set(expected["rollout/staleness"].values())) == 4

    def check(name: str) -> None:
        for key in ON_POLICY_KEYS:
            got = metrics(tmp_path / "runs" / name, key)
            assert got == pytest.approx(expected[key], rel=1e-6), (name, key)

    two = ["parallel.nproc=2"]
    ranks("gathered", *base, *two, "train.micro_batch_size=2")
    check("gathered")
    lockstep = ["rollout.engine.gather=false", "rollout.engine.token_budget=150"]
    ranks("lockstep", *base, *two, "train.micro_batch_size=1", *lockstep)
    check("lockstep")

    # From one rank's checkpoint in the middle of a window to two ranks.
    for step in (4, 6):
        shutil.rmtree(tmp_path / "runs" / "one" / "checkpoints" / f"step_{step:06d}")
    ranks("one", *base, *two, "train.micro_batch_size=2")
    check("one")


def test_two_tokenizers_on_ranks_equal_one_process(train, rows, tmp_path):
    """Groups are counted over all ranks, as tokens are; a text-only rank has its filler row."""
    teacher = train("digits_teacher", "teacher", "student=digits_small", "train.max_steps=2")
    base = options(tmp_path, rows)
    base[base.index("student=digits_small")] = "student=digits_qwen3_vl"
    base += ["teacher=local", f"teacher.name={teacher / 'export'}", "loss=gold"]
    one = train(CONFIG, "one", *base, "train.micro_batch_size=4")
    ranks("two", *base, "parallel.nproc=2", "train.micro_batch_size=1")
    for key in (*KEYS, "align/coverage", "align/unaligned"):
        got = metrics(tmp_path / "runs" / "two", key)
        assert got == pytest.approx(metrics(one, key), rel=1e-6), key
    assert min(metrics(one, "align/coverage").values()) > 0.9


def test_a_mix_on_ranks(train, rows, tmp_path):
    """Slices off-policy on all ranks at once, the teacher's or the data set's."""
    base = [*options(tmp_path, rows), "parallel.nproc=2", "train.micro_batch_size=1"]
    alone = ["teacher=none", "kd_ratio=0", "train.max_steps=2", "train.val_every=null"]
    ranks("judge", *base, *alone, "student.seed=3")
    mixed = [
        *("teacher=local", f"teacher.name={tmp_path / 'runs' / 'judge' / 'export'}"),
        *("rollout=mixed", "rollout.sampling.max_new_tokens=5", "rollout.lmbda=0.5"),
    ]
    for policy in ("dataset", "teacher"):
        ranks(policy, *base, *mixed, f"rollout.off_policy={policy}")
        run = tmp_path / "runs" / policy
        shares = metrics(run, "rollout/on_policy")
        assert set(shares.values()) <= {0, 0.5, 1} and len(set(shares.values())) > 1
        assert all(0 < loss < 100 for loss in metrics(run, "train/loss").values())


def test_adapters_on_ranks_equal_one_process(train, rows, tmp_path):
    """Initialised alike, over a base held in bfloat16, and resumed without it on other ranks."""
    base = options(tmp_path, rows)
    alone = ["teacher=none", "kd_ratio=0"]
    model = train(CONFIG, "model", *base, *alone, "train.max_steps=2", "train.micro_batch_size=4")
    base[base.index("student=digits_small")] = "student=pretrained"
    base += [
        *(*alone, f"student.name={model / 'export'}", "student.dtype=bfloat16"),
        "student.export_dtype=float32",
        *("student.lora.rank=2", "student.lora.parts=[vision_tower,projector,layers]"),
    ]
    one = train(CONFIG, "one", *base, "train.micro_batch_size=4")
    expected = {key: metrics(one, key) for key in ("train/loss", "train/grad_norm", "val/loss")}
    assert expected["train/loss"][4] < expected["train/loss"][1]

    def check(name: str) -> None:
        for key, values in expected.items():
            got = metrics(tmp_path / "runs" / name, key)
            assert got == pytest.approx(values, rel=1e-6), (name, key)

    two = ["parallel.nproc=2", "train.micro_batch_size=2"]
    ranks("sharded", *base, *two)
    check("sharded")
    weights = (tmp_path / "runs" / run / "export/model.safetensors" for run in ("one", "sharded"))
    torch.testing.assert_close(*map(load_file, weights))
    shutil.rmtree(one / "checkpoints" / "step_000004")
    ranks("one", *base, *two, "parallel.dp_replicate=2")
    check("one")


def test_a_served_teacher_on_ranks_equals_one_process(train, rows, tmp_path):
    """Each rank asks for its own rows; a server that is gone ends all of them with plain words."""
    base = options(tmp_path, rows)
    alone = ["teacher=none", "kd_ratio=0", "student.seed=3", "train.micro_batch_size=4"]
    model = train(CONFIG, "teacher", *base, *alone) / "export"
    server = Server(model, compute_dtype="float64")
    try:
        base += ["teacher=server", f"teacher.name={model}", f"teacher.urls=[{server.url}]"]
        base += ["teacher.max_length=400", "teacher.wait_s=1"]
        one = train(CONFIG, "one", *base, "train.micro_batch_size=4")
        two = [*base, "parallel.nproc=2", "train.micro_batch_size=1"]
        ranks("two", *two)
        for key in KEYS:
            got = metrics(tmp_path / "runs" / "two", key)
            assert got == pytest.approx(metrics(one, key), rel=1e-6), key
    finally:
        server.stop()
    with pytest.raises(AssertionError, match="error: no server was of use for 1 s"):
        ranks("gone", *two)


ROLLOUTS = ["rollout=student", "kd_ratio=1", "rollout.sampling.max_new_tokens=5"]


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_a_mistake_on_ranks_ends_with_plain_words(tmp_path, rows, rollout, train):
    base, how = options(tmp_path, rows), ["teacher=none", "kd_ratio=0"]
    if rollout == "student":
        short = ["train.max_steps=1", "train.val_every=null", "train.micro_batch_size=4"]
        model = train(CONFIG, "model", *base, *how, *short) / "export"
        how = ["teacher=local", f"teacher.name={model}", f"student.name={model}", *ROLLOUTS]
        base[base.index("student=digits_small")] = "student=pretrained"
    rows.write_text(rows.read_text().replace("5_0.png", "missing.png"))
    base += ["parallel.nproc=2", "train.micro_batch_size=2"]
    done = completed(*PYTHON, "--config-name", CONFIG, "run.name=bad", *base, *how)
    assert done.returncode == 2, done.tail()
    assert "missing.png" in done.stderr
    assert "Traceback" not in done.stderr
