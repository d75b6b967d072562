"""FSDP2: which modules form a group, and how weights reach the ranks.

`fully_shard` groups: every transformer block (those of a frozen vision tower together), the input
embedding where it is not tied to the head, and the root with the rest. The head stays in the root
group, which is whole from the start of the forward to the end of the backward, so the loss can read
its plain weight.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kd.parallel.compile import compile_blocks
from kd.parallel.world import DTYPES, ParallelConfig, World


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of `model`: those whose activations can be checkpointed.

    Code that is not of transformers may have none of that kind: there, those its class names.
    """
    modules = list(model.modules())
    layers: list[nn.Module] = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
    # Names only then: for some families they are those of embeddings, or of one half of a block.
    names = set(model._no_split_modules or ())
    return layers or [module for module in modules if type(module).__name__ in names]


def groups(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules that are gathered one by one, and those that are gathered together.

    The latter are the blocks of a frozen vision tower: one gather instead of one for each, at the
    price of the memory of all of them while the tower runs.
    """
    found, together = blocks(model), []
    tower = model.get_encoder(modality="image")
    # Not the tower itself: FSDP2 would change its class, by which transformers knows which of its
    # hidden states are to be collected.
    if tower not in (model, model.base_model, model.get_decoder()) and is_frozen(tower):
        inside = set(tower.modules())
        together = [block for block in found if block in inside]
    apart = [block for block in found if block not in together]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        apart.append(embedding)
    return apart, together


def is_frozen(tower: nn.Module) -> bool:
    """Whether nothing in a vision tower is trained, but for projectors that its blocks end in."""
    behind = {p for merger in mergers(tower) for p in merger.parameters()}
    return not any(p.requires_grad for p in tower.parameters() if p not in behind)


def mergers(tower: nn.Module) -> list[nn.Module]:
    """Projectors inside of a vision tower (Qwen), whose outputs leave it."""
    return [child for name, child in tower.named_children() if "merger" in name]


def shard(
    root: nn.Module,
    model: PreTrainedModel,
    world: World,
    config: ParallelConfig,
    *,
    cpu_offload: bool = False,
) -> None:
    """Shard `model`, held by the module `root`, in place over the mesh.

    Rank 0's weights win: the other ranks may hold anything of the right shape before.
    """
    # A reference to rank 0's whole tensors: sharding keeps only slices of them.
    full = root.state_dict() if world.is_main and world.size > 1 else {}
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.compute_dtype],
        reduce_dtype=DTYPES[config.reduce_dtype],
        # Blocks are handed fp32 rotary tables on purpose.
        cast_forward_inputs=False,
    )
    offload = offload_policy(world, cpu_offload)
    compile_blocks(blocks(model.get_decoder()), config)
    apart, together = groups(model)
    for group in [*apart, *([together] if together else [])]:
        fully_shard(group, mesh=world.mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(root, mesh=world.mesh, mp_policy=policy, offload_policy=offload)
    if world.size > 1:
        broadcast_weights(root, full, world)


@torch.no_grad()
def broadcast_weights(root: nn.Module, full: dict[str, Tensor], world: World) -> None:
    """Give every rank its part of rank 0's weights `full`, which are empty elsewhere. Collective.

    Sent between the ranks' devices, wherever a part is kept: with `cpu_offload`, parameters are in
    host memory and buffers are not, which `set_model_state_dict` refuses.
    """
    held = root.state_dict()
    layout = world.broadcast({name: (t.shape, t.dtype) for name, t in full.items()})
    assert layout.keys() == held.keys(), sorted(layout.keys() ^ held.keys())
    for name, (shape, dtype) in layout.items():
        if world.is_main:
            whole = full[name].to(world.device).contiguous()
        else:
            whole = torch.empty(shape, dtype=dtype, device=world.device)
        dist.broadcast(whole, src=0)
        mine = held[name]
        if isinstance(mine, DTensor):  # no source: each rank has the whole, and takes its part
            whole = distribute_tensor(
                whole, mine.device_mesh, mine.placements, src_data_rank=None
            ).to_local()
        local(mine).copy_(whole)


def needs_fsdp(
    model: PreTrainedModel, world: World, config: ParallelConfig, *, cpu_offload: bool
) -> bool:
    """Whether there is something to share out, to cast or to keep in host memory.

    If not, FSDP2 would hold a second copy of what it gathers: of the head, above all.
    """
    dtype = DTYPES[config.compute_dtype]
    return world.mesh.size() > 1 or cpu_offload or any(p.dtype != dtype for p in model.parameters())


def offload_policy(world: World, cpu_offload: bool) -> OffloadPolicy:
    """Of FSDP2: shards in host memory, or on the device."""
    return CPUOffloadPolicy(world.device.type == "cuda") if cpu_offload else OffloadPolicy()


def local(parameter: Tensor) -> Tensor:
    """The part of this rank."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
