"""Every family on two ranks: the numbers of one process, though a rank may see no image.

A micro-batch is one row on each rank, of no, one or two images: the ranks differ in that almost
always. Teachers are of another family than their students.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import metrics
from tests.distributed.test_ranks import CONFIG, KEYS, TORCHRUN, options
from tests.model.families import WITH_BUFFERS, write
from tests.processes import completed, environment

FAMILIES = [
    "lfm2_vl",
    "gemma3",
    "internvl",
    "llava_onevision",
    "idefics3",
    "smolvlm",
    "mistral3",
    "qwen3_vl",
]
FROZEN = {"gemma3", "idefics3", "qwen3_vl"}
"""Whose vision tower is not trained, and so gathered at once; Qwen's projector inside of it is."""


def models(family: str, teacher: str, folder: Path) -> list[str]:
    """Overrides that name them."""
    write(family, folder / family, seed=0)
    write(teacher, folder / f"{teacher}_teacher", seed=1)
    names = [f"student.name={folder / family}", f"teacher.name={folder / teacher}_teacher"]
    return [*names, "student=pretrained", "teacher=local", "teacher.dtype=float32"]


def answers(run: Path) -> dict[str, tuple[str, str]]:
    """What student and teacher generate on the validation rows: `{row: texts}`."""
    records = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    return {r["id"]: (r["student"], r["teacher"]) for r in records if r["type"] == "validation"}


def test_every_family_on_two_ranks_equals_one_process(train, rows, tmp_path, repo):
    base = [option for option in options(tmp_path, rows) if option != "student=digits_small"]
    base += ["loss=gold", "train.max_steps=2", "train.save_every=null"]
    teachers = [*FAMILIES[1:], FAMILIES[0]]
    runs = {
        family: [*base, *models(family, teacher, tmp_path)]
        for family, teacher in zip(FAMILIES, teachers, strict=True)
    }
    for family in FROZEN:
        runs[family].append("student.freeze=[vision_tower]")
    two = [
        [*overrides, f"run.name={family}_two", "train.micro_batch_size=1"]
        for family, overrides in runs.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(two))
    script = repo / "tests" / "distributed" / "recipe_runs.py"
    two = [*TORCHRUN, "--nproc-per-node", "2", script, tmp_path / "runs.json"]
    done = completed(*two, env=environment(PYTHONPATH=str(repo)))
    assert done.returncode == 0, done.tail()
    for family, overrides in runs.items():
        one = train(CONFIG, family, *overrides, "train.micro_batch_size=4")
        two = tmp_path / "runs" / f"{family}_two"
        for key in (*KEYS, "align/coverage", "align/unaligned"):
            assert metrics(two, key) == pytest.approx(metrics(one, key), rel=1e-6), (family, key)
        assert answers(two) == answers(one), family
        assert len(answers(one)) == 6


def test_families_with_persistent_buffers_in_host_memory(train, rows, tmp_path, repo):
    """Trained with `cpu_offload`, all weights from rank 0. Here the buffers are on the CPU as well:
    see tests/parallel/test_shard.py for those on another device.
    """
    base = [option for option in options(tmp_path, rows) if option != "student=digits_small"]
    base += ["teacher=none", "kd_ratio=0", "train.max_steps=2", "train.save_every=null"]
    base += ["student=pretrained", "validation.generate=false"]
    # Not in float64: torch has no grouped product of experts in it.
    base += ["parallel.compute_dtype=float32", "parallel.reduce_dtype=float32"]
    runs = {}
    for family in WITH_BUFFERS:
        write(family, tmp_path / family, seed=0)
        runs[family] = [*base, f"student.name={tmp_path / family}"]
    two = [
        [
            *overrides,
            f"run.name={family}_two",
            "train.micro_batch_size=1",
            "parallel.cpu_offload=true",
        ]
        for family, overrides in runs.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(two))
    script = repo / "tests" / "distributed" / "recipe_runs.py"
    command = [*TORCHRUN, "--nproc-per-node", "2", script, tmp_path / "runs.json"]
    done = completed(*command, env=environment(PYTHONPATH=str(repo)))
    assert done.returncode == 0, done.tail()
    for family, overrides in runs.items():
        one = train(CONFIG, family, *overrides, "train.micro_batch_size=4")
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            got = metrics(tmp_path / "runs" / f"{family}_two", key)
            assert got == pytest.approx(metrics(one, key), rel=1e-5), (family, key)
