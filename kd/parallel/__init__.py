"""Ranks, meshes and sharding."""

from kd.parallel.shard import blocks, offload_policy, shard
from kd.parallel.world import DTYPES, ParallelConfig, World

__all__ = ["DTYPES", "ParallelConfig", "World", "blocks", "offload_policy", "shard"]
