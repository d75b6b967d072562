"""Ranks, meshes and sharding."""

from kd.parallel.accumulation import (
    RESERVED_GIB,
    Reduction,
    choose_reduction,
    sync_gradients,
)
from kd.parallel.compile import compile_blocks
from kd.parallel.cores import cores_per_rank, num_cores
from kd.parallel.host import HostWeights
from kd.parallel.shard import blocks, groups, local, needs_fsdp, offload_policy, shard
from kd.parallel.world import DTYPES, ParallelConfig, World

__all__ = [
    "DTYPES",
    "RESERVED_GIB",
    "HostWeights",
    "ParallelConfig",
    "Reduction",
    "World",
    "blocks",
    "choose_reduction",
    "compile_blocks",
    "cores_per_rank",
    "groups",
    "local",
    "needs_fsdp",
    "num_cores",
    "offload_policy",
    "shard",
    "sync_gradients",
]
