"""Settings of a distillation that take less and less memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from kd.batching import BudgetBatching
from kd.config import VlmKDConfig
from kd.footprint import Sizes, footprint, measure, served_head, without_memory
from kd.memory_estimate import MemoryOption, Plan
from kd.parallel import World
from kd.teacher import LocalTeacherConfig

SERVED = "teacher=server"


def memory_options(
    config: VlmKDConfig, student: Sizes, teacher: Sizes | None, served_head: int = 0
) -> Iterator[MemoryOption]:
    """The config as it is, and then with one more change each that saves memory and costs time.

    The one with the teacher on servers stands for itself: it needs other GPUs.
    """
    config, overrides = copy.deepcopy(config), []
    parallel = config.parallel
    rows_of_a_rank = rows_per_step(config) / parallel.num_ranks()

    def option(teacher: Sizes | None, served_head: int) -> MemoryOption:
        mine = copy.deepcopy(config)

        def plan(rows: int) -> Plan:
            mine.train.micro_batch_size = rows
            mine.train.grad_accum = 1 if rows >= rows_of_a_rank else 2
            return footprint(mine, student, teacher, served_head)

        return MemoryOption(list(overrides), plan)

    yield option(teacher, served_head)
    batching = config.batching
    if isinstance(batching, BudgetBatching) and batching.max_tokens > config.data.max_length:
        batching.max_tokens = config.data.max_length
        overrides.append(f"batching.max_tokens={batching.max_tokens}")
        yield option(teacher, served_head)
    for name in ("activation_checkpointing", "sync_every_micro_batch"):
        if not getattr(parallel, name):  # auto: as if true, on one node and where it has to
            setattr(parallel, name, True)
            overrides.append(f"parallel.{name}=true")
            yield option(teacher, served_head)
    local = config.asked_teacher
    if isinstance(local, LocalTeacherConfig) and teacher is not None:
        here = list(overrides)
        if not (local.offload or local.cpu_offload):
            local.offload = True
            overrides.append("teacher.offload=true")
            yield option(teacher, served_head)
        elsewhere = option(None, teacher.whole.head)
        yield MemoryOption([*here, SERVED], elsewhere.plan)
    if not parallel.cpu_offload:
        parallel.cpu_offload = True
        overrides.append("parallel.cpu_offload=true")
        yield option(teacher, served_head)


def options(config: VlmKDConfig, world: World) -> tuple[Plan, list[MemoryOption]]:
    """The config's own plan, and what can be changed in a run that has begun.

    Counted on the ranks of the run, without memory of their devices.
    """
    sizes, head = measure(config, without_memory(world)), served_head(config) or 0
    found = memory_options(config, *sizes, head)
    return footprint(config, *sizes, head), [r for r in found if SERVED not in r.overrides]


def rows_per_step(config: VlmKDConfig) -> int:
    """`train.global_batch_size`, which a checked config has."""
    assert config.train.global_batch_size is not None
    return config.train.global_batch_size
