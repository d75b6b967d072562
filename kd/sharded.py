"""What FSDP2 holds on a rank beside the shards, counted before a model is sharded.

Of torch's `_fully_shard/_fsdp_param_group.py`: a group is gathered into one flat buffer, which is
copied into its whole parameters and kept until the next group has been copied; gradients are copied
into a flat buffer that is kept until those of the next group are there. One rank alone casts
into whole parameters, and needs a flat buffer for gradients only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kd.parallel import DTYPES, ParallelConfig, groups, local


@dataclass(frozen=True)
class Gathered:
    """Bytes on a rank; all 0 where nothing is sharded."""

    root: int = 0
    """The root group, the head among them: whole from the start of a forward to the end of its
    backward; of a frozen model for good."""
    blocks: int = 0
    """While blocks run: one that is whole, and the flat buffer of the next."""
    start: int = 0
    """Before the blocks run: the flat buffer of the root group, an embedding that is not in it, or
    a frozen vision tower."""
    block_gradients: int = 0
    """While blocks run backward: of one that is whole, and the flat buffer of the one before."""
    end_gradients: int = 0
    """After them: of the root group and the embedding."""


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together."""

    parameters: int = 0
    trained: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> Group:
        """All of a module's."""
        sizes = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
        return cls(sum(size for size, _ in sizes), sum(trained for _, trained in sizes))

    @classmethod
    def sum(cls, groups: Iterable[Group]) -> Group:
        """All of them together."""
        sizes = [(group.parameters, group.trained) for group in groups]
        return cls(sum(size for size, _ in sizes), sum(trained for _, trained in sizes))


NOTHING = Group()


@dataclass(frozen=True)
class Whole:
    """Parameters before sharding."""

    parameters: int
    trained: int
    block: Group
    """The largest numbers of a block."""
    embedding: Group
    """Where it is a group of its own: not tied to the head."""
    tower: Group
    """The blocks of a frozen vision tower, which are one group; empty: they are groups each."""
    root: Group
    """The rest, the head among them."""
    head: int
    trained_head: int
    vocab: int
    """Entries of the head."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.embedding.parameters == 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Whole:
        """Count those of a model."""
        whole = Group.of(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings().weight
        apart, together = groups(model)
        sizes = [Group.of(module) for module in apart if module is not embedding]
        untied = Group.of(embedding) if embedding in apart else Group()
        tower = Group.sum(Group.of(block) for block in together)
        inside = Group.sum([*sizes, untied, tower])
        rest = Group(whole.parameters - inside.parameters, whole.trained - inside.trained)
        block = Group(max(size.parameters for size in sizes), max(size.trained for size in sizes))
        trained_head = head.numel() * head.requires_grad
        parts = block, untied, tower, rest
        return cls(whole.parameters, whole.trained, *parts, head.numel(), trained_head, len(head))

    def gathered(self, placed: nn.Module, parallel: ParallelConfig) -> Gathered:
        """Of the model once it is `placed` on the ranks of `parallel`."""
        if not isinstance(placed, FSDPModule):
            return Gathered()
        return gathered(self.block, self.embedding, self.root, parallel, self.tower)


def gathered(
    block: Group, embedding: Group, root: Group, parallel: ParallelConfig, tower: Group = NOTHING
) -> Gathered:
    """Of a sharded model with such groups, on the ranks of `parallel`."""
    size = DTYPES[parallel.compute_dtype].itemsize
    reduced = DTYPES[parallel.reduce_dtype].itemsize
    flat = size * (parallel.num_ranks() > parallel.dp_replicate)
    return Gathered(
        root=size * root.parameters,
        blocks=(size + flat) * block.parameters,
        start=max(
            flat * root.parameters + size * embedding.parameters,
            (size + flat) * embedding.parameters,
            (size + flat) * tower.parameters,
        ),
        block_gradients=(size + reduced) * block.trained,
        end_gradients=max(
            size * root.trained + (size + reduced) * embedding.trained,
            (size + reduced) * root.trained,
        ),
    )


def local_bytes(module: nn.Module) -> int:
    """Of all weights on a rank."""
    return sum(local(p).nbytes for p in module.parameters())
