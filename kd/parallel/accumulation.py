"""Gradient accumulation under FSDP2: after which micro-batches gradients are reduced.

Once per optimizer step means that every rank holds all gradients unsharded until the last
micro-batch. After each micro-batch means more traffic, and shards only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kd.parallel.world import ParallelConfig, World

log = logging.getLogger("kd")

GIB = 2**30
RESERVED_GIB = 6.0
"""Of a GPU, for CUDA, NCCL and the allocator: what a memory estimate does not count."""


def sync_gradients(root: nn.Module, *, every: bool, last: bool) -> None:
    """Set whether the next backward of `root` reduces its gradients over the ranks.

    Call it before each forward of an optimizer step; `last`: of the last one, which always does.
    With HSDP, `every` reduce-scatters inside each copy; copies are all-reduced by the last one.
    """
    if isinstance(root, FSDPModule):  # its class, once sharded
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(every or last)
        root.set_requires_all_reduce(last)  # the line before has set it to its own value


@dataclass(frozen=True)
class Reduction:
    """The value that `parallel.sync_every_micro_batch` comes to, and why."""

    every: bool
    reason: str

    def agreed(self, world: World, *, accumulates: bool) -> bool:
        """`every`, if it is so on some rank: all do the same. Logged where it matters.

        Collective.
        """
        found = next((each for each in world.gather(self) if each.every), self)
        if world.is_main and accumulates and world.mesh.size() > 1:
            when = "after each micro-batch" if found.every else "once per optimizer step"
            log.info("gradients are reduced %s: %s", when, found.reason)
        return found.every


def choose_reduction(config: ParallelConfig, bytes_if_once: Callable[[], int]) -> Reduction:
    """Decide what `auto` means here.

    `bytes_if_once` estimates the bytes of a rank that reduces once per optimizer step; it is called
    where that decides.
    """
    asked = config.sync_every_micro_batch
    if isinstance(asked, bool):
        return Reduction(asked, f"parallel.sync_every_micro_batch={str(asked).lower()}")
    nodes, room = config.num_nodes(), device_room(config)
    if nodes == 1:
        return Reduction(True, "all ranks are on one node")
    if room is None:
        return Reduction(False, f"{nodes} nodes, and no GPU whose memory could be too small")
    needed = bytes_if_once()
    estimate = f"{nodes} nodes, and with unsharded gradients a rank takes {needed / GIB:.1f} GiB"
    return Reduction(needed > room, f"{estimate} (estimate) of {room / GIB:.1f} GiB")


def device_room(config: ParallelConfig) -> int | None:
    """Bytes of this rank's GPU for what an estimate counts; None: it has none."""
    if config.device_type() != "cuda":
        return None
    device = int(os.environ.get("LOCAL_RANK", 0))
    total = torch.cuda.get_device_properties(device).total_memory
    return total - int(RESERVED_GIB * GIB)
