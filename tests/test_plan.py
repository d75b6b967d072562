"""`kd.plan`: what is counted, and what it suggests."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from kd import plan
from kd.config import register, to_object, validate
from kd.flops import Row, Work
from kd.footprint import footprint, make_plan, measure, pretend_ranks
from kd.launch import config_dir
from kd.memory_estimate import GIB, GRADIENTS, TEACHER
from kd.parallel import RESERVED_GIB, ParallelConfig, choose_reduction
from tests.configs.test_yaml import composed
from tests.model.families import FAMILIES
from tests.model.kernel_standins import without_kernels


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_operations_are_those_that_torch_counts(family):
    """Of the text: the tower's depend on images. A short row, whose attention is small."""
    config, _ = FAMILIES[family]()
    model = AutoModelForImageTextToText.from_config(config).eval()
    work, tokens = Work.of(model), 4
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.arange(tokens)[None] + 20).logits.float().sum()
        forward = counter.get_total_flops()
        loss.backward()
    row = Row(tokens, 0, tokens)
    assert work.forward(row) == pytest.approx(forward, rel=0.03)
    assert work.training(row, checkpointing=False) == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )


def run(capsys, monkeypatch, *arguments: str) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["kd.plan", *arguments])
    plan.main()
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_large_model_on_gpus_of_two_sizes(capsys, monkeypatch):
    large = ["--config-name", "qwen_vl_kd", "--gpus"]
    printed = run(capsys, monkeypatch, *large, "1", "2", "--with-kernels")
    one, two = printed.split("2 GPU(s)")
    assert re.search(r"baseline \W+ does not fit \W+ 8\d\.", one)
    assert "suggested: parallel.nproc=1 train.micro_batch_size=16 " in one
    assert "teacher.offload=true" in one and "sync_every_micro_batch" not in printed
    assert "suggested: parallel.nproc=2 train.micro_batch_size=8 loss.chunk_mib=" in two
    once = "parallel.sync_every_micro_batch=false"
    printed += run(capsys, monkeypatch, once, *large, "1", "--with-kernels")
    assert "parallel.sync_every_micro_batch=true teacher.offload=true" in printed
    assert "plain PyTorch" not in printed
    # Without them rows take more, and it is said.
    without_kernels(monkeypatch)
    printed = run(capsys, monkeypatch, *large, "1")
    assert "chunk_mib=2560 teacher.offload=true parallel.cpu_offload=true" in printed
    assert "no flash-linear-attention and no causal-conv1d is installed, here." in printed
    assert "It keeps 0.49 GiB more for a row in each such layer" in printed
    assert "--with-kernels plans for a machine that has them" in printed
    monkeypatch.setattr(plan, "MOST_GPUS", 2)
    small = ["--gpus", "1", "--gpu-gib", "12"]
    printed = run(capsys, monkeypatch, "--config-name", "qwen_vl_kd", *small)
    assert "does not fit; what would: not even 2 GPUs of this size, student.lora.rank=16" in printed


@pytest.mark.parametrize(
    ("value", "nodes", "fits", "every", "reason"),
    [
        (True, 2, True, True, "parallel.sync_every_micro_batch=true"),
        (False, 1, False, False, "parallel.sync_every_micro_batch=false"),
        ("auto", 1, True, True, "all ranks are on one node"),
        ("auto", 2, True, False, "2 nodes, and with unsharded gradients a rank takes 6.0 GiB"),
        ("auto", 2, False, True, "a rank takes 6.0 GiB (estimate) of 5.0 GiB"),
        ("auto", 2, None, False, "2 nodes, and no GPU whose memory could be too small"),
    ],
)
def test_when_gradients_are_reduced(monkeypatch, value, nodes, fits, every, reason):
    """The memory of the GPU is made up: there is none here."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 // nodes))
    room = None if fits is None else (7 if fits else 5) * GIB
    monkeypatch.setattr("kd.parallel.accumulation.device_room", lambda config: room)
    config = ParallelConfig(sync_every_micro_batch=value)
    config.validate()
    chosen = choose_reduction(config, lambda: 6 * GIB)
    assert chosen.every == every and reason in chosen.reason


def test_unsharded_gradients_are_counted_where_they_are_kept(monkeypatch):
    """On two nodes by what the GPU has room for: made up, as there is none here."""
    register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = to_object(compose("qwen_vl_kd", overrides=["train.micro_batch_size=1"]))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    validate(config)
    with pretend_ranks(config.parallel) as world:
        sizes = measure(config, world)

    def gradients(value: bool | str, room_gib: int) -> int:
        monkeypatch.setattr("kd.parallel.accumulation.device_room", lambda _: room_gib * GIB)
        config.parallel.sync_every_micro_batch = value
        moments = footprint(config, *sizes).moments
        return moments["the loss, and the start of the backward"][GRADIENTS]

    sharded, whole = gradients(True, 80), gradients(False, 80)
    assert sharded == 4 * sizes[0].trained and whole == 4 * sizes[0].whole.trained
    assert gradients("auto", 80) == whole and gradients("auto", 30) == sharded


@pytest.mark.parametrize(
    ("overrides", "none"),
    [([], True), (["parallel.compute_dtype=bfloat16"], False), (["parallel.nproc=2"], False)],
    ids=str,
)
def test_alone_in_one_precision_nothing_is_gathered(kd_main, capsys, overrides, none):
    kd_main("--config-name", "digits_teacher", "dry_run=true", *overrides)
    gathered = re.search(r"gathered.*?([\d.]+) GiB", capsys.readouterr().out)
    assert gathered is not None
    assert (gathered[1] == "0.00") == none


def test_the_experiment_for_one_gpu_of_80_gb_fits(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = make_plan(composed("qwen_vl_kd", "experiment=one_gpu_80"))
    assert 60 < found.total / GIB < 80 - RESERVED_GIB
    assert all(sum(parts.values()) <= found.total for parts in found.moments.values())


def test_a_served_head_is_on_the_students_device(tmp_path, monkeypatch):
    """By the config of the teacher's folder; what is not known is said not to be counted."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made, _ = FAMILIES["qwen3_vl"]()
    made.save_pretrained(tmp_path)
    text = made.get_text_config()
    served = ["teacher=server", "teacher/engine=kd"]
    known = make_plan(composed("qwen_vl_kd", *served, f"teacher.name={tmp_path}"))
    assert known.parts[TEACHER] == 2 * text.hidden_size * text.vocab_size  # in bfloat16
    assert not known.not_counted
    unknown = make_plan(composed("qwen_vl_kd", *served, "teacher.name=some/where"))
    assert unknown.parts[TEACHER] == 0 and "the head" in unknown.not_counted[0]
    top_k = ["teacher=server", "teacher/engine=vllm", f"teacher.name={tmp_path}"]
    assert make_plan(composed("qwen_vl_kd", *top_k)).parts[TEACHER] == 0


def test_the_largest_micro_batch_divides_the_rows_of_a_rank():
    sizes = [10, 20, 30, 45, 80]

    def total(rows):
        return type("Plan", (), {"total": sizes[rows - 1]})

    assert plan.largest_micro_batch(total, 45, 4) == 4
    assert plan.largest_micro_batch(total, 44, 4) == 2, "3 does not divide 4"
    assert plan.largest_micro_batch(total, 9, 4) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu-gib", "5"], "--gpu-gib above --reserve-gib"),
        (["train.nonsense=1"], "nonsense"),
        (["--config-name", "dflash"], "dflash is no config of distillation"),
    ],
)
def test_mistakes(capsys, monkeypatch, arguments, says):
    with pytest.raises(SystemExit) as exit_:
        run(capsys, monkeypatch, "--config-name", "qwen_vl_kd", *arguments)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err
