"""Ranks, meshes and sharding."""

from kd.parallel.compile import compile_blocks
from kd.parallel.cores import num_cores
from kd.parallel.shard import blocks, local, needs_fsdp, offload_policy, shard
from kd.parallel.world import DTYPES, ParallelConfig, World

__all__ = [
    "DTYPES",
    "ParallelConfig",
    "World",
    "blocks",
    "compile_blocks",
    "local",
    "needs_fsdp",
    "num_cores",
    "offload_policy",
    "shard",
]
