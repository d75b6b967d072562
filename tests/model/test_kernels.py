"""Whether layers run as fused kernels: asked of transformers' own functions, with stand-ins."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from kd.data import Collator, Renderer
from kd.loss import ForwardKLConfig
from kd.model import FrozenVLM, Kernels, Student, check_packing
from kd.model.kernels import gpu_warning
from kd.parallel import ParallelConfig, World
from kd.types import Batch, UserError
from tests.model.conftest import ROWS
from tests.model.families import FAMILIES, write
from tests.model.kernel_standins import with_kernels, without_kernels
from tests.model.test_families import by_row, in_double

BOTH = {"fla", "causal_conv1d"}


def tiny(family: str) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_config(FAMILIES[family]()[0])


@pytest.mark.parametrize(
    ("family", "packages"),
    {
        "qwen3_5_hybrid": BOTH,
        "lfm2_vl": {"causal_conv1d"},
        "qwen3_5": set(),
        "qwen3_vl": set(),
    }.items(),
)
def test_kernels_of_the_layers_that_a_model_has(family, packages, monkeypatch):
    without_kernels(monkeypatch)
    model = tiny(family)
    assert Kernels.of(model) == Kernels(frozenset(), frozenset(packages))
    with_kernels(monkeypatch)
    assert Kernels.of(model) == Kernels(frozenset(packages), frozenset())
    assert Kernels.of(model).bounds_rows == bool(packages)
    with_kernels(monkeypatch, convolution=False)
    assert Kernels.of(model).fused == packages - {"causal_conv1d"}
    assert not Kernels.of(model).bounds_rows
    assert not Kernels.of(model).recurs_in_torch


def test_what_is_said_of_layers_without_kernels(monkeypatch):
    without_kernels(monkeypatch)
    hybrid, short = (Kernels.of(tiny(family)) for family in ("qwen3_5_hybrid", "lfm2_vl"))
    assert gpu_warning(hybrid, "student", "cuda") == (
        "warning: the student's linear attention runs in plain PyTorch: no flash-linear-attention "
        "and no causal-conv1d is installed, which is slower and takes more memory\n"
        "Install what is missing: pip install flash-linear-attention causal-conv1d"
    )
    assert gpu_warning(short, "teacher", "cuda") == (
        "warning: the teacher's short convolutions run in plain PyTorch: no causal-conv1d is "
        "installed, which is slower\nInstall what is missing: pip install causal-conv1d"
    )
    assert gpu_warning(hybrid, "student", "cpu") is None
    with_kernels(monkeypatch, convolution=False)
    said = gpu_warning(Kernels.of(tiny("qwen3_5_hybrid")), "student", "cuda")
    assert said is not None
    assert "short convolutions run" in said
    with_kernels(monkeypatch)
    assert gpu_warning(Kernels.of(tiny("qwen3_5_hybrid")), "student", "cuda") is None


def test_the_warning_is_not_silenced(world: World, monkeypatch, caplog):
    """As recipes silence transformers. The device is one in name only."""
    without_kernels(monkeypatch)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gpu = replace(world, device=torch.device("cuda"))
    teacher = FrozenVLM(tiny("qwen3_5_hybrid").bfloat16())
    # Where there is no such device, moving to it fails, after the warning.
    monkeypatch.setattr(teacher, "to", lambda device: None)
    for rank in (0, 1):
        config = ParallelConfig(compute_dtype="bfloat16")
        teacher.place(replace(gpu, rank=rank), config)
    (record,) = (record for record in caplog.records if record.name == "kd")
    assert record.levelno == logging.WARNING
    assert record.message.startswith("warning: the teacher's linear attention runs in plain")


def test_a_recurrence_in_torch_is_not_compiled(world: World, monkeypatch):
    """Of a convolution alone the graph is the same for every length."""
    config = ParallelConfig(device="cpu", compile=True)

    def place(family: str) -> None:
        Student(tiny(family), ForwardKLConfig().build(0.0)).place(world, config)

    without_kernels(monkeypatch)
    with pytest.raises(UserError) as error:
        place("qwen3_5_hybrid")
    assert str(error.value) == (
        "parallel.compile=true: the student's linear attention runs in plain PyTorch: no "
        "flash-linear-attention and no causal-conv1d is installed; torch would compile it anew for "
        "every number of chunks\nSet parallel.compile=false, or pip install "
        "flash-linear-attention causal-conv1d"
    )
    place("lfm2_vl")
    with_kernels(monkeypatch)
    place("qwen3_5_hybrid")


# ---- packed rows -------------------------------------------------------------------------------


def packed_and_padded(family: str, tmp_path) -> tuple[FrozenVLM, Batch, Batch, list[Batch]]:
    """A model in float64, rows in one sequence and padded, and what `check_packing` compares."""
    write(family, tmp_path / family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / family, dtype="float64")
    renderer = Renderer(AutoProcessor.from_pretrained(tmp_path / family))
    collate = Collator(renderer, None, 2048, False)
    rows = collate.prepare(ROWS)
    two = rows[:1] + rows[2:]
    tried = [collate.batch(two[1:]), collate.batch(two), collate.batch(two, packed=True)]
    return FrozenVLM(model), collate.batch(rows, packed=True), collate.batch(rows), tried


def check(vlm: FrozenVLM, tried: list[Batch]) -> None:
    check_packing(
        lambda inputs: vlm.read(in_double(inputs)), *(batch.student for batch in tried), "student"
    )


@pytest.mark.parametrize("family", ["qwen3_5_hybrid", "lfm2_vl"])
def test_packed_rows_are_bounded_for_kernels(family, tmp_path, monkeypatch):
    with_kernels(monkeypatch)
    vlm, packed, padded, tried = packed_and_padded(family, tmp_path)
    together = by_row(packed, vlm.read(in_double(packed.student)))
    apart = by_row(packed, vlm.read(in_double(padded.student)))
    # The delta rule and the vision towers compute in float32 in part.
    assert max((a - b).abs().max().item() for a, b in zip(apart, together, strict=True)) < 1e-5
    check(vlm, tried)


@pytest.mark.parametrize(
    "kernels", [{"bounds_rows": False}, {"convolution": False}], ids=["unbounded", "one of two"]
)
def test_kernels_that_mix_packed_rows_are_found(kernels, tmp_path, monkeypatch):
    """Those that ignore the boundaries, and a convolution that has no kernel."""
    with_kernels(monkeypatch, **kernels)
    vlm, _, _, tried = packed_and_padded("qwen3_5_hybrid", tmp_path)
    with pytest.raises(UserError, match="the student reads a row otherwise"):
        check(vlm, tried)
