"""The weights one after another, against the files that `save_pretrained` writes, byte for byte."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLMoeConfig

from kd.model import VLM, LoRAConfig, WeightStream, gather
from kd.parallel import DTYPES, ParallelConfig, World
from kd.types import UserError
from tests.model.conftest import Family
from tests.model.families import MROPE, QWEN_VISION, TEXT, write


def adapt(vlm: VLM, parts: list[str]) -> None:
    """With adapters that change the weights they stand beside."""
    vlm.adapters = LoRAConfig(rank=2, alpha=6.0, parts=parts).inject(vlm.model, 0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in vlm.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()


def parts_of(family: str) -> list[str]:
    """Those that have linear layers."""
    return ["vision_tower", *(["projector"] if family != "gemma3" else []), "layers"]


def saved(folder: Path, state: dict[str, Tensor], vlm: VLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is on the disk after `save_pretrained`, each tensor with memory of its own."""
    copies = {
        name: value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }
    vlm.model.save_pretrained(folder, state_dict=copies)
    return load_file(folder / "model.safetensors")


def assert_same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours[name], value)]
        assert torch.equal(*bits), name


def streamed(vlm: VLM, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    stream = WeightStream(vlm, dtype, world)
    pairs = [(name, value.clone()) for name, value in stream]
    found = dict(pairs)
    assert len(found) == len(pairs), "a name twice"
    assert [spec.name for spec in stream.specs] == [name for name, _ in pairs]
    assert sum(s.num_bytes for s in stream.specs) == sum(v.nbytes for v in found.values())
    return found


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_what_the_disk_has(
    family: Family, world: World, tmp_path: Path, dtype: str, adapted: bool
):
    vlm = VLM(family.model())
    if adapted:
        adapt(vlm, parts_of(family.name))
    vlm.distribute(world, ParallelConfig(device="cpu", compute_dtype="bfloat16"))
    expected = saved(tmp_path, gather(vlm), vlm, DTYPES[dtype])
    assert_same_bytes(streamed(vlm, DTYPES[dtype], world), expected)
