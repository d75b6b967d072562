"""What a run takes on GPUs of some size, and what would make it fit.

    python -m kd.plan --config-name qwen_vl_kd --gpus 1 2 8 --gpu-gib 80
    python -m kd.plan --config-name qwen_vl_kd --gpus 8 --tflops 300 --row-tokens 700 kd_ratio=1

No weights, no data and no GPU are needed. For each number of GPUs: settings that take less and less
memory, each on top of those before, with the largest micro-batch of longest rows that fits; the
first that fits is suggested.
"""

from __future__ import annotations

import argparse
import copy

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from kd.activations import torch_note
from kd.config import VlmKDConfig, register, typed_object, validate
from kd.config_dflash import register_dflash
from kd.flops import Row, Work
from kd.footprint import measure, pretend_ranks, served_head
from kd.launch import command_mistakes, config_dir, job_mistakes, set_up_messages
from kd.memory_estimate import GIB, MemoryOption, largest_micro_batch
from kd.memory_options import SERVED, memory_options, rows_per_step
from kd.model import FrozenVLM, Student
from kd.objective_loop import default_budget_mib
from kd.parallel import RESERVED_GIB
from kd.teacher import LocalTeacherConfig
from kd.types import UserError

MOST_GPUS = 64
CHECKPOINTS = "parallel.activation_checkpointing=true"
CPU_OFFLOAD = "parallel.cpu_offload=true"


class Planner:
    """Plans of one config for GPUs of one size."""

    def __init__(
        self,
        config: VlmKDConfig,
        room: float,
        row: Row,
        tflops: float,
        *,
        with_kernels: bool,
    ) -> None:
        self.config, self.room, self.row, self.tflops = config, room, row, tflops
        self.with_kernels = with_kernels
        self.operations = operations(config, row)
        self.chunk_mib = config.loss.chunk_mib or default_budget_mib(torch.device("cuda"))
        self.checkpoints = config.parallel.activation_checkpointing

    def on(self, gpus: int) -> list[tuple[MemoryOption, int]]:
        """The memory_options for so many GPUs, with the largest micro-batch of each."""
        config = copy.deepcopy(self.config)
        config.parallel.nproc = gpus
        config.loss.chunk_mib = self.chunk_mib
        with pretend_ranks(config.parallel) as world:
            sizes = measure(config, world, with_kernels=self.with_kernels)
        most = -(-rows_per_step(config) // gpus)
        found: list[tuple[MemoryOption, int]] = []
        for option in memory_options(config, *sizes, served_head(config) or 0):
            rows = largest_micro_batch(option.plan, self.room, most)
            if not found or _saves(option, rows, *found[-1]):
                found.append((option, rows))
        return found

    def seconds(self, gpus: int, *, checkpointing: bool) -> float:
        """Of a step."""
        return self.operations[checkpointing] / (gpus * self.tflops * 1e12)

    def fitting(self, more_than: int) -> int | None:
        """The least number of GPUs, by doubling, on which one of the memory_options fits."""
        gpus = 2 * more_than
        while gpus <= MOST_GPUS:
            if any(rows for _, rows in self.on(gpus)):
                return gpus
            gpus *= 2
        return None


def _saves(option: MemoryOption, rows: int, before: MemoryOption, rows_before: int) -> bool:
    least = max(1, rows)
    return rows > rows_before or option.plan(least).total < before.plan(least).total


def operations(config: VlmKDConfig, row: Row) -> tuple[float, float]:
    """Of a step, of student and teacher: without activation checkpointing, and with it."""
    rows, teacher = rows_per_step(config), 0.0
    with pretend_ranks(config.parallel):
        model = config.student.meta_model()
        student = Student(model, config.loss.build(config.kd_ratio))
        student.freeze(config.student.freeze)
        student.adapt(config.student.lora, config.run.seed)
        work = Work.of(model)
        if isinstance(config.asked_teacher, LocalTeacherConfig):
            teacher = Work.of(FrozenVLM(config.asked_teacher.meta_model()).model).forward(row)
    plain, checkpointed = (work.training(row, checkpointing=some) for some in (False, True))
    return rows * (plain + teacher), rows * (checkpointed + teacher)


def show(planner: Planner, gpus: int, console: Console) -> None:
    """One number of GPUs: its table, and what is suggested."""
    table = Table(
        title=f"{gpus} GPU(s), {planner.room / GIB:.0f} GiB of each", title_justify="left"
    )
    table.add_column("on top of the config")
    for name in ("micro-batch", "GiB on a rank", "step, s"):
        table.add_column(name, justify="right")
    found, suggested = planner.on(gpus), None
    for option, rows in found:
        plan = option.plan(max(1, rows))
        checkpointing = planner.checkpoints or CHECKPOINTS in option.overrides
        seconds = f"{planner.seconds(gpus, checkpointing=checkpointing):.2f}" if rows else ""
        if SERVED in option.overrides or CPU_OFFLOAD in option.overrides:
            seconds = ""  # of the student alone, or with the bus between: not known from counts
        name = "\n".join(option.overrides) or "baseline"
        table.add_row(name, str(rows or "does not fit"), f"{plan.total / GIB:.1f}", seconds)
        table.add_section()
        if rows and suggested is None:
            suggested = [f"parallel.nproc={gpus}", f"train.micro_batch_size={rows}"]
            suggested += [f"loss.chunk_mib={planner.chunk_mib}", *option.overrides]
    console.print(table)
    if suggested is not None:
        console.print(f"suggested: {' '.join(suggested)}\n", soft_wrap=True)
        return
    more = planner.fitting(gpus)
    others = "student.lora.rank=16 student.freeze=\\[], a smaller data.max_length or loss.chunk_mib"
    enough = f"{more} GPUs of this size" if more else f"not even {MOST_GPUS} GPUs of this size"
    console.print(f"does not fit; what would: {enough}, {others}\n", soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """Of the command line; what it does not know are overrides."""
    made = argparse.ArgumentParser(prog="kd.plan", description="what a run takes on GPUs")
    made.add_argument("--config-name", required=True)
    made.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 8])
    made.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU")
    made.add_argument(
        "--reserve-gib", type=float, default=RESERVED_GIB, help="for CUDA, NCCL, allocator"
    )
    made.add_argument("--tflops", type=float, default=300.0, help="that a GPU achieves")
    made.add_argument("--row-tokens", type=int, help="of a row on average; data.max_length")
    made.add_argument("--image-tokens", type=int, default=0, help="of them, of images")
    made.add_argument("--response-tokens", type=int, help="of them, trained on; all")
    made.add_argument(
        "--with-kernels",
        action="store_true",
        help="activations as where the kernels of linear attention are installed",
    )
    made.add_argument("overrides", nargs="*")
    return made


def plan(args: argparse.Namespace) -> None:
    """Print what is asked for."""
    register()
    register_dflash()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = typed_object(compose(args.config_name, overrides=args.overrides))
    if not isinstance(config, VlmKDConfig):
        raise UserError(
            f"{args.config_name} is no config of distillation: python -m kd.run --config-name "
            f"{args.config_name} dry_run=true prints what it takes"
        )
    validate(config)
    if min(args.gpus) < 1 or args.gpu_gib <= args.reserve_gib or args.tflops <= 0:
        raise UserError("--gpus of 1 or more, --gpu-gib above --reserve-gib, --tflops above 0")
    tokens = args.row_tokens or config.data.max_length
    row = Row(tokens, args.image_tokens, args.response_tokens or tokens)
    room = (args.gpu_gib - args.reserve_gib) * GIB
    planner = Planner(config, room, row, args.tflops, with_kernels=args.with_kernels)
    console = Console(width=None if Console().is_terminal else 100)
    console.print(
        f"{config.run.name}: {rows_per_step(config)} rows in a step, of {row.tokens} tokens: "
        f"{planner.operations[planner.checkpoints] / 1e15:.3g} PFLOP. Micro-batches are of rows of "
        f"data.max_length={config.data.max_length} tokens.\n"
    )
    for gpus in args.gpus:
        show(planner, gpus, console)
    console.print(
        f"Seconds are those at {args.tflops:g} TFLOP/s on every GPU, without waiting for data, for "
        "other ranks or for responses."
    )
    note = torch_note(config.student.meta_model(), config.data.max_length)
    if note and not args.with_kernels:
        console.print(f"{note}; --with-kernels plans for a machine that has them.")


def main() -> None:
    """Plan, and turn mistakes into plain words."""
    set_up_messages()
    transformers_logging.set_verbosity_error()
    with command_mistakes(), job_mistakes():
        plan(parser().parse_intermixed_args())


if __name__ == "__main__":
    main()
