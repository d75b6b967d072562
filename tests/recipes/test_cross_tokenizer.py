"""A teacher of another family with another tokenizer: they meet where both end a token."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import metrics

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm", "align/coverage")
EXACT = ["parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"]
SHORT = "rollout.sampling.max_new_tokens=6"


@pytest.fixture
def cross(train) -> list[str]:
    """Overrides of digits_kd: a Qwen3.5 teacher, a Qwen3-VL student of fewer tokens."""
    options = ["student=digits_small", "student.seed=7", "optim.lr=0.01", "train.max_steps=10"]
    teacher = train("digits_teacher", "teacher", *options) / "export"
    return ["experiment=digits_cross", f"teacher.name={teacher}"]


@pytest.mark.parametrize("loss", ["uld", "gold"])
def test_learns_and_covers_all_tokens(train, cross, loss):
    run = train("digits_kd", loss, *cross, f"loss={loss}", "train.max_steps=12", "optim.lr=0.01")
    kd, ce = metrics(run, "train/kd"), metrics(run, "train/ce")
    assert kd[12] < kd[1] and ce[12] < ce[1]
    assert set(metrics(run, "align/coverage").values()) == {1}
    assert set(metrics(run, "align/unaligned").values()) == {0}
    assert metrics(run, "train/loss")[3] == pytest.approx(0.9 * kd[3] + 0.1 * ce[3], rel=1e-5)


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_same_gradient_for_any_split_of_the_batch(train, cross, rollout):
    options = [*cross, *EXACT, "train.global_batch_size=6", "train.max_steps=3"]
    options += ["train.val_every=3", "validation.batch_size=4", "validation.max_new_tokens=4"]
    if rollout == "student":
        options += ["rollout=student", "kd_ratio=1", SHORT]
    at_once = train("digits_kd", "at_once", *options, "train.micro_batch_size=6")
    for micro in (1, 3):
        split = train("digits_kd", f"by_{micro}", *options, f"train.micro_batch_size={micro}")
        for key in (*LOSSES, "val/loss", "val/kd"):
            assert metrics(split, key) == pytest.approx(metrics(at_once, key), rel=1e-6), key


def test_resume_equals_never_having_stopped(train, cross):
    options = [*cross, "rollout=mixed", "rollout.window_steps=3", SHORT, "data.num_workers=1"]
    options += ["train.save_every=1", "checkpoint.keep_last=9"]
    run = train("digits_kd", "run", *options)
    whole = {key: metrics(run, key) for key in LOSSES}
    for step in range(3, 7):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    train("digits_kd", "run", *options)
    for key in LOSSES:
        assert metrics(run, key) == whole[key], key  # bit for bit


def test_a_teacher_s_responses_are_learnt_in_the_student_s_tokens(train, cross):
    options = [*cross, "rollout=teacher", "rollout.sampling.max_new_tokens=12"]
    run = train("digits_kd", "sequence", *options, "kd_ratio=0", "optim.lr=0.01")
    ce = metrics(run, "train/ce")
    assert ce[6] < ce[1]
    both = train("digits_kd", "both", *options, "kd_ratio=0.5")
    assert all(0 < kd < 100 for kd in metrics(both, "train/kd").values())


def test_a_loss_token_by_token_is_refused(train, cross, capsys):
    for options, says in (
        (["loss=forward_kl"], "choose loss=uld or loss=gold"),
        (["teacher.alignment=tokens"], "teacher.alignment=tokens, but different tokenizers"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train("digits_kd", "refused", *cross, *options)
        assert exit_.value.code == 2
        assert says in capsys.readouterr().err


def test_one_tokenizer_gives_the_same_by_tokens_and_by_bytes(train):
    options = ["student=digits_small", "student.seed=7", "optim.lr=0.01", "train.max_steps=10"]
    teacher: Path = train("digits_teacher", "teacher", *options) / "export"
    same = [f"teacher.name={teacher}", "loss=uld", *EXACT, "train.max_steps=3"]
    by_tokens = train("digits_kd", "tokens", *same)
    by_bytes = train("digits_kd", "bytes", *same, "teacher.alignment=bytes")
    for key in LOSSES:
        assert metrics(by_bytes, key) == pytest.approx(metrics(by_tokens, key), rel=1e-9), key
