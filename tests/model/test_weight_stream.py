"""The weights one after another, against the files that `save_pretrained` writes, byte for byte."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from kd.model import VLM, LoRAConfig, WeightStream, gather
from kd.parallel import DTYPES, ParallelConfig, World, local
from kd.rollout.vllm_packed import cut, packed
from kd.types import UserError
from tests.model.conftest import Family
from tests.model.families import MROPE, QWEN_VISION, TEXT, qwen3_vl, write

BUFFER_BYTES = 200_000


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


def saved(
    folder: Path, state: dict[str, Tensor], vlm: VLM, dtype: torch.dtype
) -> dict[str, Tensor]:
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


def test_experts_are_written_as_their_checkpoint_has_them(world: World, tmp_path: Path):
    """What the model holds in one tensor is many there: it is split in the stream as well."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3VLMoeConfig(
        text_config={**TEXT, **experts, "vocab_size": 99, "rope_parameters": MROPE},
        vision_config=QWEN_VISION,
    )
    vlm = VLM(AutoModelForImageTextToText.from_config(config))
    adapt(vlm, ["layers"])
    vlm.distribute(world, ParallelConfig(device="cpu"))
    expected = saved(tmp_path, gather(vlm), vlm, torch.bfloat16)
    assert_same_bytes(streamed(vlm, torch.bfloat16, world), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_not_sharded(tmp_path: Path, world: World, dtype: str):
    """In the precision that it computes in, where FSDP2 would only copy it."""
    write("qwen3_vl", tmp_path / "model")
    vlm = VLM(AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=dtype))
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    vlm.place(world, ParallelConfig(device="cpu", compute_dtype=dtype))
    expected = saved(tmp_path / "disk", gather(vlm), vlm, torch.bfloat16)
    assert_same_bytes(streamed(vlm, torch.bfloat16, world), expected)
    assert all(torch.equal(p, before[name]) for name, p in vlm.named_parameters())


def test_a_model_converted_as_a_whole_is_refused(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
):
    """Conversions across blocks: none of transformers' does it, so one that does is put there."""
    write("qwen3_vl", tmp_path)
    vlm = VLM(AutoModelForImageTextToText.from_pretrained(tmp_path))
    renamed = {0: "first"}

    def counting(model: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{renamed.get(i, i)}.{name}": value for i, (name, value) in enumerate(state.items())
        }

    monkeypatch.setattr("kd.model.stream.revert_weight_conversion", counting)
    with pytest.raises(UserError, match="cannot be converted block by block"):
        WeightStream(vlm, torch.bfloat16, world)


# ---- memory ------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make, as long as it lives; not what was there before."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {local(value).untyped_storage()._cdata for value in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and value.device.type != "meta":
                value = value.elem if isinstance(value, AsyncCollectiveTensor) else local(value)
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_of(world: World, adapted: bool) -> tuple[int, int, int]:
    """Live bytes at most while a deep model is packed as NCCL sends it, the bound, the whole."""
    config, _ = qwen3_vl(num_layers=24)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 128
    config.text_config.intermediate_size = 256
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vlm = VLM(AutoModelForImageTextToText.from_config(config))
    if adapted:
        adapt(vlm, ["layers"])
    vlm.distribute(world, ParallelConfig(device="cpu"))
    stream = WeightStream(vlm, torch.bfloat16, world)
    sizes = {spec.name: spec.num_bytes for spec in stream.specs}
    buffers = [sum(spec.num_bytes for spec in specs) for specs in cut(stream.specs, BUFFER_BYTES)]
    assert len(buffers) > 5
    # While one buffer is on its way the next is filled; on the way into it are a group, and one
    # tensor as it is gathered (shard, padded, whole) or merged (W, A, B, B A, all in float32).
    bound = 2 * max(buffers) if world.is_main else 0
    bound += max(sum(sizes[name] for name in group) for group in stream.groups)
    merged = [2 * sizes[f"{layer}.weight"] for layer in vlm.adapters.layers]
    bound += 3 * max(sizes.values()) + 4 * max(merged, default=0)
    with LiveBytes(vlm.state_dict().values()) as live:
        on_the_way = [torch.empty(0)]
        for buffer in packed(stream, BUFFER_BYTES, world.device):
            on_the_way[0] = buffer
            del buffer
        on_the_way.clear()
    assert live.now <= max(sizes.values()), "nothing stays"
    return live.peak, bound, sum(sizes.values())


@pytest.mark.parametrize("adapted", [False, True])
def test_it_never_holds_the_whole_model(world: World, adapted: bool):
    peak, bound, whole = peak_of(world, adapted)
    assert 2 * BUFFER_BYTES < peak <= bound < whole / 3


def memory_of_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    world = World(mesh, torch.device("cpu"), rank, 2)
    for adapted in (False, True):
        peak, bound, whole = peak_of(world, adapted)
        assert 0 < peak <= bound < whole / 3, (rank, peak, bound, whole)
    for name in ("gemma3", "qwen3_vl", "glm4v"):  # tied heads, and renamed weights
        if rank == 0:
            write(name, folder / name)
        world.barrier()
        vlm = VLM(AutoModelForImageTextToText.from_pretrained(folder / name))
        adapt(vlm, ["layers"])
        vlm.distribute(world, ParallelConfig(device="cpu", compute_dtype="bfloat16"))
        state = gather(vlm)
        found = (
            streamed(vlm, torch.bfloat16, world)
            if rank == 0
            else list(WeightStream(vlm, torch.bfloat16, world))
        )
        if rank == 0:
            assert_same_bytes(found, saved(folder / "disk" / name, state, vlm, torch.bfloat16))
        else:
            assert found == []
    world.barrier()


def test_two_ranks(tmp_path: Path):
    mp.start_processes(memory_of_a_rank, (tmp_path,), nprocs=2, start_method="forkserver")
