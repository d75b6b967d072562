from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import metrics
from tests.processes import python, started

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm")


@pytest.fixture
def teacher(train) -> Path:
    """A teacher that has learnt a little: its export folder."""
    return (
        train(
            "digits_teacher", "teacher", "student=digits_small", "student.seed=7", "optim.lr=0.01"
        )
        / "export"
    )


def test_distils_and_exports(train, teacher, tmp_path):
    options = [f"teacher.name={teacher}", "student.export_dtype=bfloat16"]
    run = train("digits_kd", "kd", *options, "train.max_steps=12", "optim.lr=0.01")
    losses = metrics(run, "train/loss")
    assert list(losses) == list(range(1, 13))
    assert losses[12] < 0.75 * losses[1], losses
    kd, ce, loss = (metrics(run, f"train/{name}")[3] for name in ("kd", "ce", "loss"))
    assert loss == pytest.approx(0.9 * kd + 0.1 * ce, rel=1e-5)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"

    assert json.loads((run / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(run / "export" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "lm_head.weight" not in names, "a tied head is stored once"
    assert "model.language_model.embed_tokens.weight" in names

    model = AutoModelForImageTextToText.from_pretrained(run / "export")
    processor = AutoProcessor.from_pretrained(run / "export")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = processor(text=[prompt], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_teacher_equal_to_student_gives_zero_kl(train, teacher):
    run = train(
        "digits_kd",
        "self",
        f"teacher.name={teacher}",
        "student=pretrained",
        f"student.name={teacher}",
        "train.max_steps=1",
        "optim.warmup_steps=0",
    )
    assert metrics(run, "train/kd")[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resume_equals_never_having_stopped(train, teacher, checkpointing):
    options = [
        f"teacher.name={teacher}",
        "train.max_steps=14",
        "train.grad_accum=2",
        "train.micro_batch_size=2",
        f"parallel.activation_checkpointing={checkpointing}",
        "data.num_workers=1",
    ]
    whole = train("digits_kd", "whole", *options)
    # Stopped by what its user would see too: step 5's checkpoint is the last thing on disk.
    stopped = train(
        "digits_kd", "stopped", *options, "train.save_every=4", "checkpoint.keep_last=9"
    )
    for step in (8, 12, 14):
        subprocess.run(["rm", "-r", stopped / "checkpoints" / f"step_{step:06d}"], check=True)
    resumed = train(
        "digits_kd", "stopped", *options, "train.save_every=4", "checkpoint.keep_last=9"
    )
    for key in LOSSES:
        assert metrics(resumed, key) == metrics(whole, key), key  # bit for bit
    ours, theirs = (
        AutoModelForImageTextToText.from_pretrained(run / "export") for run in (resumed, whole)
    )
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


def test_background_saves_hold_the_step_they_name(train):
    options = ["student=digits_small", "train.save_every=1", "checkpoint.keep_last=9"]
    now = train("digits_teacher", "now", *options)
    later = train("digits_teacher", "later", *options, "checkpoint.save_async=true")
    for step in range(2, 7):
        for run in (now, later):
            subprocess.run(["rm", "-r", run / "checkpoints" / f"step_{step:06d}"], check=True)
    train("digits_teacher", "later", *options)
    assert metrics(later, "train/loss") == metrics(now, "train/loss")


def test_validation_never_touches_training(train, teacher):
    without = train("digits_kd", "without", f"teacher.name={teacher}")
    with_ = train("digits_kd", "with", f"teacher.name={teacher}", "train.val_every=2")
    for key in LOSSES:
        assert metrics(with_, key) == metrics(without, key)
    assert list(metrics(with_, "val/loss")) == [2, 4, 6]
    assert set(metrics(with_, "val/accuracy")) == {2, 4, 6}
    rows = [json.loads(line) for line in (with_ / "samples.jsonl").read_text().splitlines()]
    answered = [row for row in rows if row["type"] == "validation"]
    assert answered and all(row["teacher"] is not None for row in answered)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_same_gradient_for_any_split_of_the_batch(train, teacher, loss):
    options = [
        f"teacher.name={teacher}",
        f"loss={loss}",
        "train.global_batch_size=6",
        "train.max_steps=4",
        "parallel.compute_dtype=float64",
        "parallel.reduce_dtype=float64",
    ]
    at_once = train("digits_kd", "at_once", *options, "train.micro_batch_size=6")
    for micro in (1, 3):
        split = train(
            "digits_kd",
            f"by_{micro}",
            *options,
            f"train.micro_batch_size={micro}",
            f"parallel.sync_every_micro_batch={str(micro == 1).lower()}",
        )
        for key in LOSSES:
            ours, theirs = metrics(split, key), metrics(at_once, key)
            assert ours == pytest.approx(theirs, rel=1e-6), key


def test_frozen_parts_stay(train, teacher):
    run = train(
        "digits_kd",
        "frozen",
        f"teacher.name={teacher}",
        "student=pretrained",
        f"student.name={teacher}",
        "student.freeze=[model.visual]",
        "student.export_dtype=float32",
    )
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path) for path in (teacher, run / "export")
    )
    moved = {
        name
        for name, weight in after.state_dict().items()
        if not torch.equal(weight, before.state_dict()[name])
    }
    assert moved and not any(name.startswith("model.visual") for name in moved)


def test_best_checkpoint_is_kept_and_exported(train):
    run = train(
        "digits_teacher",
        "best",
        "student=digits_small",
        "train.val_every=1",
        "optim.lr=0.05",  # too much: validation gets worse again
        "checkpoint.best_metric=val/loss",
        "checkpoint.keep_last=1",
        "train.export=best",
        "validation.generate=false",
        "train.max_steps=8",
    )
    losses = metrics(run, "val/loss")
    best = min(losses, key=lambda step: losses[step])
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == sorted({f"step_{best:06d}", "step_000008"})


def test_text_only_rows_resume_with_a_tower_that_never_ran(train, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"}]}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = [
        *("student=digits_small", "teacher=none", "kd_ratio=0", "parallel=fsdp"),
        *("data=conversations", f"data.path={tmp_path / 'rows.jsonl'}", "data.num_workers=0"),
        *("data.val_samples=null", "train.global_batch_size=null", "train.save_every=2"),
        *("parallel.cpu_threads=1", "checkpoint.keep_last=9"),
    ]
    run = train("qwen_vl_kd", "text", *options)
    whole = metrics(run, "train/loss")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    train("qwen_vl_kd", "text", *options)
    assert metrics(run, "train/loss") == whole


def test_damaged_later_checkpoints_keep_nothing_whole_from_being_kept(train):
    options = ["student=digits_small", "train.save_every=2", "checkpoint.keep_last=9"]
    run = train("digits_teacher", "pruned", *options)
    for step in (4, 6):
        (run / "checkpoints" / f"step_{step:06d}" / "small.json").write_text("{}")
    options = ["student=digits_small", "train.save_every=1", "checkpoint.keep_last=1"]
    train("digits_teacher", "pruned", *options)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000006"]
    assert json.loads((run / "checkpoints/step_000006/small.json").read_text())["step"] == 6


def test_the_best_step_survives_a_resume(train):
    options = [
        *("student=digits_small", "train.val_every=1", "optim.lr=0.05", "train.max_steps=8"),
        *("checkpoint.best_metric=val/loss", "checkpoint.keep_last=1", "train.export=best"),
        *("validation.generate=false", "student.export_dtype=float32"),
    ]
    whole = train("digits_teacher", "whole", *options)
    cut = train("digits_teacher", "cut", *options, "checkpoint.keep_last=9")
    for step in (7, 8):
        shutil.rmtree(cut / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
    train("digits_teacher", "cut", *options, "checkpoint.save_async=true")
    names = [
        sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
        for run in (whole, cut)
    ]
    assert names[0] == names[1]
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]


def test_ratio_0_needs_no_teacher_to_be_there(train, tmp_path):
    run = train("digits_kd", "ce", "kd_ratio=0", f"teacher.name={tmp_path / 'nowhere'}")
    alone = train("digits_kd", "alone", "experiment=digits_ce")
    assert metrics(run, "train/loss") == metrics(alone, "train/loss")


def test_non_finite_loss_names_the_step_and_its_rows(train, capsys):
    with pytest.raises(SystemExit) as exit_:
        train("digits_teacher", "diverged", "student=digits_small", "optim.lr=1e30")
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-2].startswith("error: step 2: loss ")
    assert "Its samples: digits" in error[-1]


def test_hybrid_attention_student(train, teacher):
    layers = "[linear_attention,full_attention,full_attention]"
    run = train(
        "digits_kd",
        "hybrid",
        f"teacher.name={teacher}",
        f"student.architecture.text_config.layer_types={layers}",
        "train.max_steps=2",
        "train.micro_batch_size=2",
    )
    assert metrics(run, "train/grad_norm")[2] > 0


def test_killed_at_any_moment_resumes_from_the_last_whole_checkpoint(train, tmp_path):
    options = [
        "student=digits_small",
        "train.save_every=1",
        "train.max_steps=40",
        f"run.dir={tmp_path / 'runs'}",
        "logger=jsonl",
        "train.val_every=null",
        "train.micro_batch_size=2",
        "train.log_every=1",
        "optim.warmup_steps=2",
        "parallel.cpu_threads=1",
    ]
    command = python("-m", "kd.run", "--config-name", "digits_teacher", *options)
    checkpoints = tmp_path / "runs" / "killed" / "checkpoints"
    seen: list[int] = []
    for delay_s in (0.05, 0.31):  # a save follows a save: most of the time is spent in one
        enough = max(seen, default=0) + 4
        with started(*command, "run.name=killed") as process:
            process.wait_for((checkpoints / f"step_{enough:06d}").exists)
            time.sleep(delay_s)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        seen += [int(path.name[5:]) for path in checkpoints.glob("step_*")]
    assert max(seen) < 40, "the run ended before it was killed"
    killed = train("digits_teacher", "killed", *options, fast=False)
    whole = train("digits_teacher", "whole", *options, fast=False)
    assert metrics(killed, "train/loss") == metrics(whole, "train/loss")
    assert not list(checkpoints.glob(".partial_*"))


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(train, caplog):
    options = ["student=digits_small", "train.save_every=2", "checkpoint.keep_last=9"]
    run = train("digits_teacher", "damaged", *options)
    whole = metrics(run, "train/loss")
    victim = next((run / "checkpoints" / "step_000006" / "state").glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with caplog.at_level("INFO"):
        train("digits_teacher", "damaged", *options)
    assert "step_000006 is damaged" in caplog.text
    assert "after step 4" in caplog.text
    assert metrics(run, "train/loss") == whole


def test_another_config_in_the_same_directory_is_refused(train, capsys):
    run = train("digits_teacher", "taken", "student=digits_small")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as exit_:
        train("digits_teacher", "taken", "student=digits_small", "optim.lr=0.5")
    assert exit_.value.code == 2
    assert "optim.lr: 0.0006 -> 0.5" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before


def test_tokenizer_mismatch_says_what_differs(train, teacher, capsys):
    with pytest.raises(SystemExit) as exit_:
        train("digits_kd", "mismatch", f"teacher.name={teacher}", "student.vocab_size=300")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "different tokenizers: 300 and " in error
