"""Teachers that are not beside the student all the time: the same training as with one that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import metrics

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm", "val/loss", "val/kd")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teacher") / "export"


@pytest.fixture
def teacher(train, teacher_folder) -> str:
    """A trained teacher's folder, made once."""
    if not teacher_folder.exists():
        made = train("digits_teacher", "teacher", "student=digits_small", "train.max_steps=10")
        (made / "export").rename(teacher_folder)
    return str(teacher_folder)


def test_offloaded_between_its_uses(train, teacher):
    options = [f"teacher.name={teacher}", "train.max_steps=3", "train.global_batch_size=12"]
    options += ["train.val_every=3", "validation.generate=false", "teacher.dtype=float32"]
    beside = train("digits_kd", "beside", *options)
    away = train("digits_kd", "away", *options, "teacher.offload=true")
    for key in LOSSES:
        assert metrics(away, key) == metrics(beside, key), key
