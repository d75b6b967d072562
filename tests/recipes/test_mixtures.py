"""Both recipes on a mixture of data sets."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import metrics
from tests.dflash.conftest import build, save

WORDS = ["+data@data.datasets.words=digits", "data.datasets.words.kinds=[recite,add]",
         "data.datasets.words.val_samples=3"]  # fmt: skip
PICTURES = ["+data@data.datasets.pictures=digits", "data.datasets.pictures.kinds=[which]",
            "data.datasets.pictures.val_samples=5"]  # fmt: skip
MIXED = ["data=mixture", "data.num_workers=0", "train.micro_batch_size=4", "train.log_every=1",
         "parallel.cpu_threads=1"]  # fmt: skip
STUDENT = ["student=digits_small", "teacher=none", "kd_ratio=0", "parallel=fsdp", "doctor=never",
           "train.global_batch_size=null", "validation.max_new_tokens=3"]  # fmt: skip


def test_results_on_a_data_set_are_those_it_has_alone(train):
    options = [*STUDENT, *MIXED, "train.max_steps=2", "train.val_every=2", "train.save_every=null",
               "optim.warmup_steps=0"]  # fmt: skip
    alone = train("qwen_vl_kd", "alone", *options, *WORDS, "+data.weights={words:1}", fast=False)
    both = train("qwen_vl_kd", "both", *options, *PICTURES, *WORDS,
                 "+data.weights={words:2,pictures:0}", fast=False)  # fmt: skip
    assert metrics(alone, "train/loss") == metrics(both, "train/loss")
    for key in ("val/loss", "val/ce", "val/kd", "val/accuracy"):
        assert metrics(alone, key) == metrics(both, f"{key}_words"), key
        words, pictures = (metrics(both, f"{key}_{name}")[2] for name in ("words", "pictures"))
        assert min(words, pictures) <= metrics(both, key)[2] <= max(words, pictures), key
    assert metrics(both, "val/ce_words") != metrics(both, "val/ce_pictures")
    assert metrics(both, "val/rows") == {2: 8}
    assert metrics(both, "val/accuracy_pictures.which") == metrics(both, "val/accuracy_pictures")
    assert metrics(both, "data/share_words") == {1: 1, 2: 1}
    assert metrics(both, "data/share_pictures") == {}


def test_resume_equals_never_having_stopped(train, tmp_path):
    options = [*STUDENT, *MIXED, *PICTURES, *WORDS, "+data.weights={words:1,pictures:1}"]
    options += ["train.max_steps=5", "train.val_every=null", "train.save_every=2",
                "optim.warmup_steps=0"]  # fmt: skip
    whole = train("qwen_vl_kd", "whole", *options, fast=False)
    half = tmp_path / "runs" / "half"
    shutil.copytree(whole, half)
    for step in ("step_000004", "step_000005"):
        shutil.rmtree(half / "checkpoints" / step, ignore_errors=True)
    config = half / "config.yaml"
    config.write_text(config.read_text().replace("name: whole", "name: half"))
    train("qwen_vl_kd", "half", *options, fast=False)
    for key in ("train/loss", "data/share_words", "data/epochs_pictures"):
        assert metrics(half, key) == metrics(whole, key), key
        assert len(metrics(whole, key)) == 5
    assert 0 < metrics(whole, "data/share_words")[5] < 1


def test_a_draft_learns_from_a_mixture(train, tmp_path):
    target = save(build("hybrid"), tmp_path / "target")
    options = [f"target.name={target}", "draft.target_layer_ids=[0,2]", "draft.block_size=4",
               "rollout.sampling.max_new_tokens=8", "validation.max_new_tokens=8",
               "train.max_steps=2", "train.val_every=2", "optim.warmup_steps=0"]  # fmt: skip
    run = train("dflash", "draft", *options, *MIXED, *PICTURES, *WORDS,
                "+data.weights={words:1,pictures:1}", fast=False)  # fmt: skip
    shares = [metrics(run, f"data/share_{name}")[2] for name in ("words", "pictures")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert metrics(run, "val/accept_length_words") == metrics(run, "val/accept_length_text")
    assert metrics(run, "val/accept_length_pictures") == metrics(run, "val/accept_length_image")


def test_a_name_that_a_metric_has_is_refused(train, capsys):
    clash = [part.replace("words", "text") for part in WORDS]
    with pytest.raises(SystemExit):
        train("dflash", "clash", *MIXED, *clash, "+data.weights={text:1}", fast=False)
    assert "val/accept_length_text has another meaning" in capsys.readouterr().err
