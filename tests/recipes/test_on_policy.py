"""The recipe on responses that are generated: by the student, the teacher, or both."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.conftest import metrics

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm", "rollout/length_mean")
SHORT = "rollout.sampling.max_new_tokens=6"
ON_POLICY = ["rollout=student", "kd_ratio=1", "loss=reverse_kl", SHORT]
EXACT = ["parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"]


@pytest.fixture
def teacher(train) -> Path:
    """A teacher that has learnt a little: its export folder."""
    options = ["student=digits_small", "student.seed=7", "optim.lr=0.01", "train.max_steps=10"]
    return train("digits_teacher", "teacher", *options) / "export"


def test_the_student_learns_on_its_own_responses(train, teacher):
    options = [f"teacher.name={teacher}", "train.max_steps=12", "optim.lr=0.01"]
    run = train("digits_kd", "own", *options, *ON_POLICY)
    kd = metrics(run, "train/kd")
    assert kd[12] < 0.5 * kd[1]
    assert set(metrics(run, "train/ce").values()) == {0}
    assert metrics(run, "train/loss") == kd
    assert set(metrics(run, "rollout/on_policy").values()) == {1}
    assert set(metrics(run, "rollout/staleness").values()) == {0}
    assert metrics(run, "train/num_targets")[1] == 4 * metrics(run, "rollout/length_mean")[1]


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_same_gradient_for_any_split_of_a_window(train, teacher, loss):
    options = [
        *ON_POLICY,
        *EXACT,
        f"teacher.name={teacher}",
        f"loss={loss}",
        "train.global_batch_size=6",
        "train.max_steps=4",
        "rollout.num_generations=2",
        "rollout.window_steps=2",
    ]
    at_once = train("digits_kd", "at_once", *options, "train.micro_batch_size=6")
    for micro in (1, 3):
        split = train("digits_kd", f"by_{micro}", *options, f"train.micro_batch_size={micro}")
        for key in LOSSES:
            assert metrics(split, key) == pytest.approx(metrics(at_once, key), rel=1e-6), key


def test_resume_in_the_middle_of_a_window_equals_never_having_stopped(train, teacher):
    options = [
        f"teacher.name={teacher}",
        *("rollout=mixed", "rollout.lmbda=0.6", SHORT),
        *("rollout.window_steps=4", "train.max_steps=7", "train.grad_accum=2"),
        *("train.micro_batch_size=2", "data.num_workers=1"),
    ]
    whole = train("digits_kd", "whole", *options)
    assert len(set(metrics(whole, "rollout/on_policy").values())) > 1, "a real mix"
    saving = ["train.save_every=1", "checkpoint.keep_last=9"]
    stopped = train("digits_kd", "stopped", *options, *saving)
    small = json.loads((stopped / "checkpoints/step_000002/small.json").read_text())
    assert small["source"]["pending"], "step 2 is in the middle of a window"
    for step in range(3, 8):
        shutil.rmtree(stopped / "checkpoints" / f"step_{step:06d}")
    resumed = train("digits_kd", "stopped", *options, *saving)
    for key in (*LOSSES, "rollout/staleness", "rollout/on_policy"):
        assert metrics(resumed, key) == metrics(whole, key), key  # bit for bit
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_sequence_level_distillation_needs_no_kd(train, teacher):
    """The teacher responds; at kd_ratio=0 it is not asked for its distribution."""
    options = [f"teacher.name={teacher}", "rollout=teacher", SHORT]
    alone = train("digits_kd", "sequence", *options, "kd_ratio=0", "optim.lr=0.01")
    ce = metrics(alone, "train/ce")
    assert metrics(alone, "train/loss") == ce and ce[6] < ce[1]
    assert set(metrics(alone, "train/kd").values()) == {0}
    both = train("digits_kd", "both", *options, "kd_ratio=0.5")
    first = {key: metrics(both, f"train/{key}")[1] for key in ("loss", "ce", "kd")}
    assert first["ce"] == pytest.approx(ce[1]) and first["kd"] > 0
    assert first["loss"] == pytest.approx(0.5 * first["ce"] + 0.5 * first["kd"])


def responses(run: Path) -> list[list[str]]:
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [line["tokens"] for line in lines if line["type"] == "rollout"]


def test_a_teacher_that_reads_larger_images_responds_to_those(train, teacher):
    """It samples what the same weights do as a student that reads images of that size.

    Hot and long, so that a small difference of the distributions meets some token.
    """
    sizes = {"min_pixels": 9216, "max_pixels": 65536}
    base = [f"teacher.name={teacher}", "train.max_steps=1", "optim.warmup_steps=0"]
    base += ["train.val_every=1", "kd_ratio=1", "train.micro_batch_size=24"]
    base += ["rollout.sampling.temperature=3", "rollout.sampling.max_new_tokens=24"]
    larger = [f"teacher.processor.{name}={size}" for name, size in sizes.items()]
    small = train("digits_kd", "small_images", *base, "rollout=teacher")
    large = train("digits_kd", "large_images", *base, "rollout=teacher", *larger)
    assert responses(large) != responses(small)
    as_student = ["rollout=student", "student=pretrained", f"student.name={teacher}"]
    as_student += [f"student.processor.{name}={size}" for name, size in sizes.items()]
    own = train("digits_kd", "own_images", *base, *larger, *as_student)
    assert responses(own) == responses(large)
    assert metrics(own, "train/kd")[1] == pytest.approx(0, abs=1e-6)


def test_a_mix_learns_labels_from_reference_rows_alone(train, teacher):
    """All slices off-policy: the very numbers of rollout=dataset."""
    options = [f"teacher.name={teacher}", "data.shuffle=true"]
    dataset = train("digits_kd", "dataset", *options)
    mixed = ["rollout=mixed", "rollout.lmbda=0", SHORT]
    off = train("digits_kd", "off", *options, *mixed)
    for key in ("train/loss", "train/ce", "train/kd", "train/grad_norm"):
        assert metrics(off, key) == metrics(dataset, key), key
    off_teacher = train(
        "digits_kd",
        "off_teacher",
        *(*options, *mixed, "rollout.off_policy=teacher", "rollout.lmbda=0.5"),
    )
    assert all(math.isfinite(x) for x in metrics(off_teacher, "train/loss").values())


def test_the_report_shows_what_was_trained_on(train, teacher):
    options = [f"teacher.name={teacher}", "train.val_every=3", *ON_POLICY]
    run = train("digits_kd", "watched", *options)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rollouts = [line for line in lines if line["type"] == "rollout"]
    assert {line["step"] for line in rollouts} == {3, 6} and len(rollouts) == 8
    last = [line for line in rollouts if line["step"] == 6]
    shown = sum(sum(line["divergence"]) for line in last)
    num_targets = metrics(run, "train/num_targets")[6]
    assert num_targets == sum(len(line["tokens"]) for line in last)
    assert shown / num_targets == pytest.approx(metrics(run, "train/kd")[6], rel=1e-5)
    assert all(line["policy"] == "student" and line["images"] for line in last)
    page = (run / "report.html").read_text()
    assert "Rollouts" in page and "Rollout length" in page


def test_prompts_without_room_are_counted(train, teacher):
    options = [f"teacher.name={teacher}", *ON_POLICY, "train.micro_batch_size=8"]
    full = train("digits_kd", "full", *options)
    assert metrics(full, "data/dropped_too_long")[6] == 0
    # The digits' prompts have 30 to 50 tokens: some have no room left for a response.
    run = train("digits_kd", "short", *options, "data.max_length=45")
    dropped = metrics(run, "data/dropped_too_long")
    assert 0 < dropped[6] < 48
    responses = {
        step: metrics(run, "train/num_targets")[step] / length
        for step, length in metrics(run, "rollout/length_mean").items()
    }
    assert sum(responses.values()) == pytest.approx(48 - dropped[6]), "no response is thrown away"


def test_a_mix_without_a_usable_answer_ends_with_plain_words(train, teacher, tmp_path, capsys):
    """All slices off-policy, all answers too long: nothing would be trained on."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "odd " * 90},
            ]
        }
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = [
        *("student=pretrained", f"student.name={teacher}", "parallel=fsdp"),
        *("teacher=local", f"teacher.name={teacher}"),
        *("data=conversations", f"data.path={tmp_path / 'rows.jsonl'}", "data.num_workers=0"),
        *("data.val_samples=null", "data.val_fraction=0", "data.max_length=60"),
        *("train.global_batch_size=null", "parallel.cpu_threads=1", SHORT),
    ]
    with pytest.raises(SystemExit) as exit_:
        train("qwen_vl_kd", "nothing", *options, "rollout=mixed", "rollout.lmbda=0")
    assert exit_.value.code == 2
    assert "a whole epoch, could be used" in capsys.readouterr().err


def test_an_epoch_of_prompts_without_room_ends_with_plain_words(train, teacher, capsys):
    options = [f"teacher.name={teacher}", *ON_POLICY, "data.max_length=20"]
    with pytest.raises(SystemExit) as exit_:
        train("digits_kd", "none", *options, "data.num_images=4")
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "a whole epoch, could be used" in error and "more than data.max_length 20" in error
