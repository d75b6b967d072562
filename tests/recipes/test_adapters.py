"""Students of which only adapters are trained, from the first step to the exported folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from tests.conftest import metrics

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm")


LORA = ["student.lora.rank=4", "student.lora.parts=[projector,layers]", "optim.lr=0.01"]


@pytest.fixture
def base(train) -> Path:
    """A model that has learnt little."""
    options = ["student=digits_small", "optim.lr=0.01", "train.max_steps=3"]
    return train("digits_teacher", "base", *options) / "export"


def logits(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[prompt], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_adapters_learn_resume_and_are_exported_both_ways(train, base):
    """Resumed bit for bit, with dropout; exported again from the finished run the other way."""
    teacher = train(
        "digits_teacher", "teacher", "student=digits_small", "student.seed=7", "optim.lr=0.01"
    )
    options = [
        *(f"teacher.name={teacher / 'export'}", "student=pretrained", f"student.name={base}"),
        *(*LORA, "student.lora.dropout=0.1", "student.export_dtype=float32", "train.max_steps=8"),
    ]
    whole = train("digits_kd", "whole", *options)
    losses = metrics(whole, "train/loss")
    assert losses[8] < 0.8 * losses[1], losses

    saving = [*options, "train.save_every=4", "checkpoint.keep_last=9"]
    cut = train("digits_kd", "cut", *saving)
    shutil.rmtree(cut / "checkpoints" / "step_000008")
    train("digits_kd", "cut", *saving)
    for key in LOSSES:
        assert metrics(cut, key) == metrics(whole, key), key
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    merged = logits(AutoModelForImageTextToText.from_pretrained(whole / "export"), whole / "export")
    train("digits_kd", "whole", *options, "student.lora.export=adapters")
    assert metrics(whole, "train/loss") == losses
    assert not (whole / "export" / "model.safetensors").exists()
    # transformers finds the base by its name.
    adapted = AutoModelForImageTextToText.from_pretrained(whole / "export")
    torch.testing.assert_close(logits(adapted, whole / "export"), merged, atol=1e-4, rtol=1e-4)


def test_checkpoints_hold_adapters_alone_and_know_their_base(train, base, tmp_path, capsys):
    options = [
        *("student=pretrained", f"student.name={base}", *LORA, "student.export_dtype=float32"),
        *("train.val_every=1", "train.max_steps=4", "validation.generate=false"),
        *("checkpoint.best_metric=val/loss", "checkpoint.best_mode=max", "train.export=best"),
    ]
    run = train("digits_teacher", "best", *options)
    losses = metrics(run, "val/loss")
    step = max(losses, key=lambda step: losses[step])
    assert step < 4, losses
    dcp_to_torch_save(run / f"checkpoints/step_{step:06d}/state", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")["student"]
    before = load_file(base / "model.safetensors")
    after = load_file(run / "export" / "model.safetensors")
    for name, weight in before.items():
        a, b = (f"model.{name.removesuffix('weight')}lora_{x}.default.weight" for x in "AB")
        expected = weight + 16 / 4 * state.pop(b) @ state.pop(a) if a in state else weight
        torch.testing.assert_close(after[name], expected, msg=name)
    assert not state, "nothing but adapters"

    before[name].view(-1)[0] += 1e-3
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as exit_:
        train("digits_teacher", "best", *options)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"{run / 'checkpoints' / 'step_000004'} was saved with other frozen weights" in error


def test_adapters_learn_from_the_students_own_responses(train, base):
    """Of a model made from scratch, too."""
    options = [
        *("student=digits_small", "student.seed=3", *LORA, f"teacher.name={base}"),
        *("rollout=student", "kd_ratio=1", "rollout.sampling.max_new_tokens=5"),
        *("train.max_steps=3", "train.val_every=3"),
    ]
    run = train("digits_kd", "on_policy", *options)
    assert all(metrics(run, "train/grad_norm").values())
    assert set(metrics(run, "val/accuracy")) == {3}
