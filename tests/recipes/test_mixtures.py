"""Both recipes on a mixture of data sets."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kd.config import register, to_object, validate
from kd.metrics import mix
from kd.parallel import ParallelConfig
from kd.run import config_dir
from recipes.vlm_kd import VlmKD
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
    for key in ("train/loss", "train/ce", "train/kd"):
        assert metrics(both, f"{key}_words") == pytest.approx(metrics(both, key), rel=1e-6), key
    assert metrics(both, "train/loss_pictures") == {}
    for key in ("val/loss", "val/ce", "val/kd", "val/accuracy"):
        assert metrics(alone, key) == metrics(both, f"{key}_words"), key
        words, pictures = (metrics(both, f"{key}_{name}")[2] for name in ("words", "pictures"))
        assert min(words, pictures) <= metrics(both, key)[2] <= max(words, pictures), key
    assert metrics(both, "val/ce_words") != metrics(both, "val/ce_pictures")
    assert metrics(both, "val/rows") == {2: 8}
    assert metrics(both, "val/accuracy_pictures.which") == metrics(both, "val/accuracy_pictures")
    assert metrics(both, "data/share_words") == {1: 1, 2: 1}
    assert metrics(both, "data/share_pictures") == {}


def steps_of(overrides: list[str], steps: int) -> list[tuple[dict[str, float], list]]:
    """Of each step its metrics, and the micro-batches with their divergences."""
    register()
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            cfg = to_object(compose("qwen_vl_kd", overrides=overrides))
        validate(cfg)
        recipe = VlmKD(cfg, world)
        return [(recipe.train_step(), list(recipe.trained)) for _ in range(steps)]
    finally:
        world.close()


EXACT = ["parallel.compute_dtype=float64", "parallel.reduce_dtype=float64", "kd_ratio=0.4",
         "train.global_batch_size=6", "optim.warmup_steps=0", "optim.lr=0.003",
         "train.micro_batch_size=6", "data.max_length=100", "parallel=fsdp", "doctor=never",
         "data=mixture", "data.num_workers=0", "parallel.cpu_threads=1"]  # fmt: skip
MIX = [*PICTURES, *WORDS, "+data.weights={words:2,pictures:1}"]


@pytest.fixture
def teacher(train) -> Path:
    """A random teacher with the tokenizer of these rows: its export folder."""
    options = [*STUDENT, *MIXED, *MIX, "student.seed=7", "optim.warmup_steps=0",
               "train.max_steps=1", "train.val_every=null"]  # fmt: skip
    return train("qwen_vl_kd", "teacher", *options, fast=False) / "export"


FAMILY = ["student=digits_small", "loss=jsd"]
OTHERS = ["student=digits_qwen3_vl", "loss=uld"]
SAMPLED = ["rollout.sampling.max_new_tokens=5", "kd_ratio=1"]
KINDS = {
    "tokens": FAMILY,
    "groups": OTHERS,
    "sampled tokens": [*FAMILY, "rollout=student", *SAMPLED],
    "sampled groups": [*OTHERS, "rollout=student", *SAMPLED],
}
SPLITS = {
    "at once": [],
    "one by one": ["train.micro_batch_size=1"],
    "by tokens": ["batching=token_budget"],
}
PER_DATA_SET = ("train/loss_", "train/ce_", "train/kd_")


def check_step(found: dict[str, float], trained: list, kd_ratio: float) -> dict[str, float]:
    """That the losses by data set, which are returned, are those of its targets."""
    targets, kd_targets, kd_sums = counted(trained)
    losses = {key: x for key, x in found.items() if key.startswith(PER_DATA_SET)}
    ce = {name: losses[f"train/ce_{name}"] for name in targets}
    kd = {name: kd_sums[name] / n for name, n in kd_targets.items() if n}
    wanted = {f"train/ce_{name}": mean for name, mean in ce.items()}
    wanted |= {f"train/kd_{name}": mean for name, mean in kd.items()}
    wanted |= {f"train/loss_{name}": mix(ce[name], kd.get(name, 0), kd_ratio) for name in ce}
    assert losses == pytest.approx(wanted, rel=1e-12)
    for key, means, counts in (("train/ce", ce, targets), ("train/kd", kd, kd_targets)):
        whole = sum(mean * counts[name] for name, mean in means.items())
        assert whole / max(1, sum(counts.values())) == pytest.approx(found[key], rel=1e-12)
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_data_sets_make_up_those_of_the_step(teacher, kind):
    base = [*EXACT, *MIX, *KINDS[kind], "teacher=local", f"teacher.name={teacher}"]
    runs = {split: steps_of([*base, *more], 2) for split, more in SPLITS.items()}
    losses = {
        split: [check_step(*step, 1.0 if "sampled" in kind else 0.4) for step in steps]
        for split, steps in runs.items()
    }
    for split in SPLITS:
        for one, other in zip(losses[split], losses["at once"], strict=True):
            assert one == pytest.approx(other, rel=1e-6), split
    assert [len(trained) for _, trained in runs["one by one"]] == [6, 6]
    keys = {key + name for key in PER_DATA_SET for name in ("pictures", "words")}
    if kind == "sampled groups":  # no sampled word can be aligned: targets, but none of the KD
        keys.remove("train/kd_words")
    assert {key for step in losses["at once"] for key in step} == keys


def test_a_student_s_samples_have_no_ce_beside_answers(teacher):
    options = [*EXACT, *MIX, *OTHERS, "teacher=local", f"teacher.name={teacher}", "rollout=mixed",
               "rollout.sampling.max_new_tokens=5", "train.micro_batch_size=1"]  # fmt: skip
    ((found, trained),) = steps_of(options, 1)
    policies = {batch.rollouts[0].policy for batch, _ in trained}
    assert policies == {"dataset", "student"}
    check_step(found, trained, 0.4)


def counted(trained: list) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Targets, KD targets and divergences of each data set, response by response."""
    targets, kd_targets, kd_sums = Counter(), Counter(), Counter()
    for batch, kd_N in trained:
        end = 0
        for rollout in batch.rollouts:
            name, rows = rollout.sample.dataset, range(end, end + len(rollout.response_ids))
            end = rows.stop
            targets[name] += len(rows)
            starts = rows if batch.groups is None else [s[0] for s in batch.groups.spans]
            kd_targets[name] += sum(start in rows for start in starts)
            kd_sums[name] += float(kd_N[rows.start : rows.stop].sum())
    return targets, kd_targets, kd_sums


def test_without_a_mixture_no_loss_is_told_apart(train):
    run = train("digits_teacher", "alone", "student=digits_small", "train.max_steps=1",
                "optim.warmup_steps=0", "doctor=never")  # fmt: skip
    keys = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {key for key in keys if key.startswith(("train/loss", "train/ce", "train/kd"))} == {
        "train/loss", "train/ce", "train/kd",
    }  # fmt: skip


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
