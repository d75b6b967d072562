"""What is said when a run is out of memory: where, what a step holds, what would fit, what is safe.

Nothing here allocates on the device: the figures of the allocator are those in its own message, and
the memory estimate is counted on the meta device.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import itertools
import logging
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from kd.checkpoint import Checkpoints
from kd.config import AnyRun
from kd.dflash import Target, read_blocks
from kd.doctor import Doctor
from kd.memory_estimate import GIB, MemoryOption, Plan
from kd.model import VLM, Student, check_images, export
from kd.objective import chunked_objective
from kd.optim import clip_gradients
from kd.parallel import RESERVED_GIB, World
from kd.process import ALLOCATOR
from kd.teacher.local import LocalTeacher, OffloadedTeacher
from kd.types import Batch, UserError
from kd.validation import Validator
from kd.validation_dflash import DraftEvaluator

log = logging.getLogger("kd")

Options = Callable[[Any, World], tuple[Plan, list[MemoryOption]]]
"""Of a config: its plan, and settings that take less, from the fastest to the slowest."""

OTHERS_WAIT_S = 10.0
"""All ranks are mostly out of memory at once: rank 0 ends the others."""
SHOWN = 3
"""Settings that are shown, at most."""
EXPANDABLE = "expandable_segments:True"


class _OutOfMemory(UserError):
    """In two lines; what led to it has been said before."""


@contextlib.contextmanager
def explain_out_of_memory(config: AnyRun, world: World, options: Options) -> Iterator[None]:
    """Around a run: where a device or the host has no more memory, say so, and raise UserError.

    Other errors pass, and with `traceback=true` this one does, too.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError, OSError) as error:
        on_device = is_of_device(error)
        if not on_device and not is_of_host(error):
            raise
        if not world.is_main:
            time.sleep(OTHERS_WAIT_S)
        what = "host memory" if not on_device else str(world.device)
        words = f"out of memory ({what}) in {place_of(error)}: {_first_sentences(error)}"
        if on_device:
            for line in explanation(config, world, options, DeviceMemory.of(str(error))):
                log.error(line)
        if config.traceback:
            raise
    # Not while that error is handled: its frames hold what the run has allocated.
    raise _OutOfMemory(f"{words}\n{what_is_safe(config.run.path)}")


def is_of_device(error: BaseException) -> bool:
    """Whether an accelerator had no memory: for the allocator, or for a library beside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "CUBLAS_STATUS_ALLOC_FAILED" in text
        or "CUDA error: out of memory" in text
        or ("NCCL" in text and "out of memory" in text)
    )


def is_of_host(error: BaseException) -> bool:
    """Whether this machine had no memory for the process."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _first_sentences(error: BaseException) -> str:
    """Up to what was tried; the allocator's figures follow it."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    tried = re.match(r".*?Tried to allocate [\d.]+ \w+", line)
    return line if tried is None else tried[0]


# ---- where ---------------------------------------------------------------------------------------


@functools.cache
def _places() -> tuple[dict[CodeType, str], dict[CodeType, str]]:
    """(what a step, or what is around it, was doing), by the code that did."""
    doing: dict[Callable[..., Any], str] = {
        Tensor.backward: "the backward",
        Student.distill: "the student's forward",
        chunked_objective: "the loss",
        LocalTeacher.targets: "the teacher's forward",
        OffloadedTeacher.expect: "the teacher's forward",
        VLM.generate: "generating responses",
        VLM.place: "placing a model on the device",
        Target.states: "the target's forward",
        read_blocks: "the draft's forward",
        Batch.to: "copying a batch to the device",
        clip_gradients: "clipping the gradients",
        torch.optim.AdamW.step: "the optimizer",
        Checkpoints.save: "saving a checkpoint",
        Checkpoints.load: "loading a checkpoint",
        export: "writing the export",
    }
    during: dict[Callable[..., Any], str] = {
        Doctor.__call__: "the doctor's checks",
        check_images: "the check of image settings",
        Validator.losses: "validation",
        Validator.answers: "validation",
        DraftEvaluator.__call__: "validation",
    }
    codes = (
        {inspect.unwrap(f).__code__: words for f, words in of.items()} for of in (doing, during)
    )
    inner, outer = codes
    return inner, outer


def place_of(error: BaseException) -> str:
    """In which part of the run an error came up, by the functions that it has passed."""
    doing, during = _places()
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = [doing[code] for code in codes if code in doing]
    outer = [during[code] for code in codes if code in during]
    return " of ".join([*inner[-1:], *outer[:1]]) or "setting up"


# ---- what ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes, as the allocator's message gives them when it gives up; None: it does not."""

    total: int | None
    free: int | None
    process: int | None
    """Of this process, with what is not PyTorch's."""
    allocated: int | None
    unused: int | None
    """Reserved by PyTorch, and not allocated."""
    tried: int | None

    @classmethod
    def of(cls, message: str) -> DeviceMemory:
        """Read them."""
        number = r"([\d.]+) (bytes|KiB|MiB|GiB|TiB)"
        units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

        def find(pattern: str) -> int | None:
            found = re.search(pattern.replace("#", number), message)
            return None if found is None else int(float(found[1]) * units[found[2]])

        return cls(
            find("total capacity of #"),
            find("of which # is free"),
            find("this process has # memory in use"),
            find("# is allocated by PyTorch"),
            find("# is reserved by PyTorch but unallocated"),
            find("Tried to allocate #"),
        )

    @property
    def others(self) -> int:
        """Of other processes on the device."""
        if self.total is None or self.free is None or self.process is None:
            return 0
        return max(0, self.total - self.free - self.process)

    @property
    def is_fragmented(self) -> bool:
        """Whether enough was reserved and unused, but not in one piece."""
        return self.unused is not None and self.tried is not None and self.unused >= self.tried

    def lines(self) -> Iterator[str]:
        """In words."""
        if self.total is None:
            return
        named = {
            "allocated": self.allocated,
            "reserved by PyTorch and unused": self.unused,
            "free": self.free,
            "of other processes": self.others or None,
        }
        figures = (f"{_gib(size)} {name}" for name, size in named.items() if size is not None)
        yield f"the device has {_gib(self.total)}: {', '.join(figures)}"
        if self.is_fragmented:
            chosen = " ".join(os.environ.get(name, "") for name in ALLOCATOR)
            advice = "" if EXPANDABLE in chosen else f": set PYTORCH_ALLOC_CONF={EXPANDABLE}"
            yield (
                "What was reserved and unused would have been enough, but is in pieces "
                f"(fragmentation){advice}"
            )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def explanation(
    config: AnyRun, world: World, options: Options, memory: DeviceMemory
) -> Iterator[str]:
    """Line by line: the device, what a step holds by the memory estimate, and what would fit."""
    yield from memory.lines()
    try:
        plan, memory_options = options(config, world)
        found = _fitting(config, memory_options, _room(memory, plan))
        fitting = list(itertools.islice(found, SHOWN))
    except Exception as error:  # of any kind: what is wrong is the memory
        yield f"no memory estimate: {str(error).partition(chr(10))[0] or type(error).__name__}"
        return
    yield f"memory estimate of a rank, longest rows, at its peak ({plan.peak}):"
    for name, size in {**plan.parts, "total": plan.total}.items():
        yield f"  {name:<{max(map(len, plan.parts))}}  {_gib(size):>11}"
    if memory.total is not None and plan.total + RESERVED_GIB * GIB <= memory.total - memory.others:
        yield (
            "By it this config fits: rows are longer or images larger than it takes them to be, "
            "memory is fragmented, or it counts too little"
        )
    if not fitting:
        yield "Of the settings of python -m kd.plan none fits here: it says how many GPUs would do"
        return
    yield "What fits by it (python -m kd.plan has the others); add one line to the same command:"
    for overrides, total in fitting:
        yield f"  {' '.join(overrides)}  # {_gib(total)}"


def _room(memory: DeviceMemory, plan: Plan) -> float:
    """Less than the config takes, and on the device but for what others have there."""
    if memory.total is None:
        return plan.total - 1
    return min(plan.total - 1, memory.total - memory.others - RESERVED_GIB * GIB)


def _fitting(
    config: AnyRun, memory_options: list[MemoryOption], room: float
) -> Iterator[tuple[list[str], int]]:
    """Overrides and totals that fit, each less than the one before; no larger micro-batch."""
    rows, least = config.train.micro_batch_size, math.inf
    assert rows is not None and config.train.grad_accum is not None  # of a checked config
    of_a_rank = rows * config.train.grad_accum
    for option in memory_options:
        for micro in range(rows, 0, -1):
            total = option.plan(micro).total
            if of_a_rank % micro == 0 and total <= room and total < least:
                split = [
                    f"train.micro_batch_size={micro}",
                    f"train.grad_accum={of_a_rank // micro}",
                ]
                yield [*(split if micro < rows else []), *option.overrides], total
                least = total
                break


# ---- what is safe --------------------------------------------------------------------------------


def what_is_safe(run_dir: Path) -> str:
    """A checkpoint is whole or absent."""
    steps = sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))
    if not steps:
        return "There is no checkpoint yet: the run begins anew"
    return (
        f"Checkpoint step_{steps[-1]:06d} is whole, nothing is lost up to step {steps[-1]}: the "
        "same command goes on from there, also with other settings of memory"
    )
