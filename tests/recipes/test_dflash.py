"""The draft's recipe through the front door, on tiny targets."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kd.dflash import load_draft
from tests.conftest import metrics
from tests.dflash.conftest import build, save

DRAFT = ["draft.target_layer_ids=[0,2]", "draft.block_size=4"]
TINY = [*DRAFT, "rollout.sampling.max_new_tokens=8"]
ANSWERS = [*DRAFT, "rollout=dataset"]  # no generation: only the numbers of training


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    """Of a module's runs."""
    return f"target.name={save(build('hybrid'), tmp_path_factory.mktemp('target'))}"


def weights(run):
    return load_file(run / "export" / "model.safetensors")


def test_a_run_from_its_target_s_responses_to_an_export(train, target, capsys):
    run = train(
        "dflash", "run", target, *TINY, "train.val_every=3", "validation.max_new_tokens=8",
        "validation.batch_size=5", "checkpoint.best_metric=val/accept_length",
        "checkpoint.best_mode=max", "profile=true",
    )  # fmt: skip
    losses = metrics(run, "train/loss")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and all(map(math.isfinite, losses.values()))
    for key in ("val/accept_length", "val/accept_length_image", "val/accept_length_text"):
        assert all(1 <= value <= 4 for value in metrics(run, key).values()), key
        assert sorted(metrics(run, key)) == [3, 6]
    assert set(metrics(run, "rollout/policy_teacher").values()) <= {1.0}
    draft = load_draft(run / "export")
    assert draft.target_layer_ids == [0, 2] and draft.block_size == 4
    row = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert row["student"].replace(" | ", "").startswith(row["teacher"][:1])
    assert (run / "report.html").stat().st_size > 10_000
    table = (run / "profile.txt").read_text()
    for part in ("data", "rollout", "target", "draft", "backward", "optimizer"):
        assert float(re.search(rf"^{part} +([\d.]+)", table, re.MULTILINE)[1]) > 0, part


@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_micro_batches_and_accumulation_change_nothing(train, target, weighting):
    base = [target, *ANSWERS, f"draft/weighting={weighting}", "train.global_batch_size=8"]
    base += ["draft.num_anchors=2", "train.max_steps=4"]
    base += ["parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"]
    whole = train("dflash", "whole", *base, "train.micro_batch_size=8")
    for size in (4, 1):
        split = train("dflash", f"split{size}", *base, f"train.micro_batch_size={size}")
        for key in ("train/loss", "train/grad_norm", "train/num_blocks", "train/accept_length"):
            assert metrics(split, key) == pytest.approx(metrics(whole, key), rel=1e-6), key


def test_resuming_equals_never_having_stopped(train, target, tmp_path):
    base = [target, *TINY, "draft.num_anchors=2", "train.save_every=2", "checkpoint.keep_last=9"]
    whole = train("dflash", "whole", *base)
    half = tmp_path / "runs" / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "export")
    for step in ("step_000004", "step_000006"):
        shutil.rmtree(half / "checkpoints" / step)
    config = half / "config.yaml"
    config.write_text(config.read_text().replace("name: whole", "name: half"))
    train("dflash", "half", *base)
    assert metrics(half, "train/loss") == metrics(whole, "train/loss")
    found, expected = weights(half), weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_short_responses_are_counted(train, target):
    run = train("dflash", "short", target, *TINY, "rollout.sampling.max_new_tokens=1")
    assert metrics(run, "data/too_short")[6] == 6 * 4
    assert set(metrics(run, "train/num_blocks").values()) == {0}
    assert set(metrics(run, "train/loss").values()) == {0}


def test_states_kept_on_disk_are_those_of_the_target(train, target, tmp_path, capsys):
    folder = tmp_path / "states"
    base = [*ANSWERS, "parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"]
    live = train("dflash", "live", target, *base)
    filled = train("dflash", "filled", target, *base, f"target.states_folder={folder}")
    again = train("dflash", "again", target, *base, f"target.states_folder={folder}")
    for key in ("train/loss", "train/grad_norm", "train/accept_length"):
        assert metrics(filled, key) == pytest.approx(metrics(live, key), rel=1e-9), key
        assert metrics(again, key) == metrics(filled, key), key
    assert metrics(filled, "target/states_found")[1] == 0
    assert set(metrics(again, "target/states_found").values()) == {1}
    # Neither another target's nor a damaged one.
    other = f"target.name={save(build('full'), tmp_path / 'other')}"
    (segment,) = (folder / "segments").glob("*.safetensors")
    whole = segment.read_bytes()
    for name, model, says in [
        ("other", other, "is of another teacher"),
        ("flipped", target, "has changed"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            train("dflash", name, model, *base, f"target.states_folder={folder}")
        assert exit_.value.code == 2 and says in capsys.readouterr().err
        half = len(whole) // 2
        segment.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["draft.mask_token=null"], "no token that could stand for MASK"),
        (["draft.mask_token='<|im_start|>'"], "which stands for MASK"),
        (["draft.target_layer_ids=[0,3]"], "0 to 2 can be tapped"),
        (["draft.hidden_size=64"], "the target is 32 wide"),
        (["draft.embed_key=nothing"], "draft.embed_key=nothing"),
        (["rollout=student"], "rollout=teacher (the target responds)"),
        (["rollout.sampling.max_new_tokens=600"], "leaves no room"),
        (["target.name=./nowhere"], "cannot load ./nowhere"),
    ],
)
def test_refusals(train, target, capsys, options, says):
    with pytest.raises(SystemExit) as exit_:
        train("dflash", "refused", target, *TINY, *options)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_a_config_of_no_recipe_is_refused(train, capsys):
    with pytest.raises(SystemExit) as exit_:
        train("serve", "refused", fast=False)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err
