"""What a config will take, counted without weights: `dry_run=true`, and `kd.plan`.

Both models are built on the meta device and sharded over a process group that exists in name only,
so the bytes of weights and optimizer are those of rank 0, exactly. Activations are an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kd.activations import kept_bytes, torch_note
from kd.config import VlmKDConfig
from kd.model import FrozenVLM, Student
from kd.objective_loop import default_budget_mib
from kd.parallel import (
    DTYPES,
    ParallelConfig,
    Reduction,
    World,
    choose_reduction,
    groups,
    local,
)
from kd.teacher import LocalTeacherConfig

GIB = 2**30


@dataclass
class Sizes:
    """Of a model that is sharded over the ranks of a config."""

    whole: Whole
    gathered: int
    """Numbers that FSDP2 makes whole at once."""
    weights: int
    """Bytes of a rank."""
    trained: int
    """Numbers of a rank."""
    kept_per_token: int
    """Bytes that the backward of its language model needs, …"""
    kept_by_checkpoints: int
    """… and with activation checkpointing."""


@dataclass
class Plan:
    """Counts for one rank of a run; bytes unless said otherwise."""

    ranks: int
    student_parameters: int
    trained_parameters: int
    teacher_parameters: int
    student_weights: int
    gradients: int
    optimizer: int
    teacher_weights: int
    teacher_gathered: int
    teacher_head: int
    """What stays of a teacher that leaves the device between uses."""
    gathered: int
    activations: int
    loss_buffers: int
    rows_per_step: int
    tokens_per_step: int
    teacher_leaves: bool = False

    @property
    def total(self) -> int:
        """Bytes on one rank at the peak of a step."""
        resident = self.student_weights + self.optimizer
        learning = self.gradients + self.gathered + self.activations + self.loss_buffers
        teaching = self.teacher_weights + self.teacher_gathered
        if self.teacher_leaves:
            return resident + max(teaching, self.teacher_head + learning)
        return resident + teaching + learning


@contextmanager
def pretend_ranks(parallel: ParallelConfig) -> Iterator[World]:
    """Rank 0 of the ranks that a config asks for, in name only; inside of a run, this rank."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks, replicas = parallel.num_ranks(), parallel.dp_replicate
    running = dist.is_initialized()
    if not running:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        shape, names = (replicas, ranks // replicas), ("dp_replicate", "dp_shard")
        if replicas == 1:
            shape, names = shape[1:], names[1:]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        # More than one rank would start by sending weights, and there are none.
        yield World(mesh, torch.device("meta"), rank=0, size=1)
    finally:
        if not running:
            dist.destroy_process_group()


def make_plan(config: VlmKDConfig) -> Plan:
    """Build, freeze and shard both models without weights, and count."""
    return footprint(config, *measure(config))


def measure(config: VlmKDConfig, *, with_kernels: bool = False) -> tuple[Sizes, Sizes | None]:
    """The student, and the teacher if it is on the same ranks.

    Activations as on this machine, or as where the kernels of linear attention are installed.
    """
    with pretend_ranks(config.parallel) as world:
        model = config.student.meta_model()
        kept = _kept(config, model, with_kernels)
        student = Student(model, config.loss.build(config.kd_ratio))
        student.freeze(config.student.freeze)
        student.adapt(config.student.lora, config.run.seed)
        whole = Whole.of(model)
        student.place(world, config.parallel, cpu_offload=config.parallel.cpu_offload)
        # Also checks the optimizer's choices.
        config.optim.build(student, config.train.max_steps)
        trained = sum(local(p).numel() for p in student.parameters() if p.requires_grad)
        mine = Sizes(whole, whole.gathered_by(student), local_bytes(student), trained, *kept)
        if not isinstance(config.asked_teacher, LocalTeacherConfig):
            return mine, None
        model = config.asked_teacher.meta_model()
        vlm = FrozenVLM(model)
        whole = Whole.of(model)  # once it is frozen, as its tower is one group then
        vlm.place(world, config.parallel, cpu_offload=config.asked_teacher.cpu_offload)
        return mine, Sizes(whole, whole.gathered_by(vlm), local_bytes(vlm), 0, 0, 0)


def footprint(config: VlmKDConfig, student: Sizes, teacher: Sizes | None) -> Plan:
    """Of a config whose models and ranks have these sizes."""
    train, parallel = config.train, config.parallel
    compute_bytes = DTYPES[parallel.compute_dtype].itemsize
    # FSDP2 keeps them beside the shards, and only there.
    unsharded = DTYPES[parallel.reduce_dtype].itemsize * student.whole.trained
    unsharded *= student.gathered > 0 and accumulates(config)
    unsharded *= not reduction(config, lambda: (student, teacher)).every
    on_device = not parallel.cpu_offload
    checkpoints = parallel.activation_checkpointing
    kept = student.kept_by_checkpoints if checkpoints else student.kept_per_token
    tokens = config.batching.tokens_at_once(train.micro_batch_size, config.data.max_length)
    device = torch.device(parallel.device_type())
    chunk_mib = config.loss.chunk_mib or default_budget_mib(device)
    plan = Plan(
        ranks=parallel.num_ranks(),
        student_parameters=student.whole.parameters,
        trained_parameters=student.whole.trained,
        teacher_parameters=0,
        student_weights=student.weights * on_device,
        gradients=4 * student.trained * on_device + unsharded,
        optimizer=8 * student.trained * on_device,
        teacher_weights=0,
        teacher_gathered=0,
        teacher_head=0,
        gathered=compute_bytes * student.gathered,
        activations=kept * tokens,
        # The chunk of logits, and the gradient of a head that is trained in float32.
        loss_buffers=chunk_mib * 2**20 + 4 * student.whole.trained_head,
        rows_per_step=train.global_batch_size or 0,
        tokens_per_step=(train.global_batch_size or 0) * config.data.max_length,
    )
    if teacher is not None:
        asked = config.asked_teacher
        assert isinstance(asked, LocalTeacherConfig)
        plan.teacher_parameters = teacher.whole.parameters
        plan.teacher_weights = 0 if asked.cpu_offload else teacher.weights
        plan.teacher_gathered = compute_bytes * teacher.gathered
        plan.teacher_head = compute_bytes * teacher.whole.head
        plan.teacher_leaves = asked.offload
    return plan


def accumulates(config: VlmKDConfig) -> bool:
    """Whether an optimizer step may take several micro-batches."""
    rows, micro_batches = config.train.micro_batch_size, config.train.grad_accum
    return config.batching.accumulates(rows, micro_batches)


def reduction(config: VlmKDConfig, measured: Callable[[], tuple[Sizes, Sizes | None]]) -> Reduction:
    """When gradients are reduced; `measured` gives the sizes where the memory decides."""
    once = replace(config, parallel=replace(config.parallel, sync_every_micro_batch=False))
    return choose_reduction(config.parallel, lambda: footprint(once, *measured()).total)


def sync_every_micro_batch(config: VlmKDConfig, world: World) -> bool:
    """What `parallel.sync_every_micro_batch` comes to: the same on every rank. Collective."""
    with torch.random.fork_rng(devices=[]):  # building a model to be measured draws nothing
        chosen = reduction(config, lambda: measure(config))
    return chosen.agreed(world, accumulates=accumulates(config))


def _kept(config: VlmKDConfig, model: PreTrainedModel, with_kernels: bool) -> tuple[int, int]:
    itemsize = DTYPES[config.parallel.compute_dtype].itemsize
    plain, checkpoints = (
        kept_bytes(model, 1, itemsize, checkpointing=some, with_kernels=with_kernels)
        for some in (False, True)
    )
    return plain, checkpoints


@dataclass
class Whole:
    """Parameters before sharding."""

    parameters: int
    trained: int
    largest_block: int
    tower: int
    """In the blocks of a frozen vision tower, which are one group; 0: they are groups each."""
    root: int
    """In the root group, the head among them: whole on every rank during a step."""
    head: int
    trained_head: int

    def gathered_by(self, placed: nn.Module) -> int:
        """Whole on a rank at once: the root, a block, and the one that is gathered meanwhile.

        A frozen tower is whole before a student keeps activations, which then take more.
        """
        largest = self.largest_block
        if isinstance(placed, FrozenVLM):
            largest = max(largest, self.tower)
        return (self.root + self.largest_block + largest) * isinstance(placed, FSDPModule)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Whole:
        """Count those of a model."""
        head = model.get_output_embeddings().weight
        apart, together = groups(model)
        alone = [sum(p.numel() for p in module.parameters()) for module in apart]
        tower = sum(p.numel() for block in together for p in block.parameters())
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(
            parameters,
            trained,
            max(alone),
            tower,
            parameters - sum(alone) - tower,
            head.numel(),
            head.numel() * head.requires_grad,
        )


def local_bytes(module: nn.Module) -> int:
    """Of all weights on a rank."""
    return sum(local(p).nbytes for p in module.parameters())


def print_plan(config: VlmKDConfig) -> None:
    """Print the counts as a table."""
    plan = make_plan(config)
    table = Table(title=f"{config.run.name}: plan for {plan.ranks} rank(s)", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("student parameters", f"{plan.student_parameters / 1e9:.3f} B")
    table.add_row("  of them trained", f"{plan.trained_parameters / 1e9:.3f} B")
    table.add_row("teacher parameters", f"{plan.teacher_parameters / 1e9:.3f} B")
    table.add_section()
    for name, size in {
        f"student weights ({config.student.dtype}, sharded)": plan.student_weights,
        "gradients": plan.gradients,
        "optimizer (AdamW, sharded)": plan.optimizer,
        "teacher weights (sharded)": plan.teacher_weights,
        "gathered blocks, embeddings and heads": plan.gathered + plan.teacher_gathered,
        "activations (estimate, longest rows)": plan.activations,
        "loss buffers": plan.loss_buffers,
        "sum on each rank": plan.total,
    }.items():
        table.add_row(name, f"{size / GIB:.2f} GiB")
    table.add_section()
    table.add_row("rows per optimizer step", f"{plan.rows_per_step:,}")
    table.add_row("tokens per step, at most", f"{plan.tokens_per_step:,}")
    table.add_row("optimizer steps", f"{config.train.max_steps:,}")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    console.print(
        "Checked: every config key and combination, both architectures, sharding, optimizer and "
        "loss. Not checked: that weights, processors and data can be reached."
    )
    note = torch_note(config.student.meta_model(), config.data.max_length)
    if note:
        console.print(note)
