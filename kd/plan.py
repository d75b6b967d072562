"""What a config will take, counted without weights: `dry_run=true`.

Both models are built on the meta device and sharded over a process group that exists in name only,
so the bytes of weights and optimizer are those of rank 0, exactly. Activations are an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kd.activations import kept_bytes
from kd.config import VlmKDConfig
from kd.model import FrozenVLM, Student
from kd.objective_loop import default_budget_mib
from kd.parallel import DTYPES, ParallelConfig, World, blocks
from kd.teacher import LocalTeacherConfig

GIB = 2**30


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
    gathered: int
    activations: int
    loss_buffers: int
    rows_per_step: int
    tokens_per_step: int

    @property
    def total(self) -> int:
        """Bytes on one rank at the peak of a step."""
        return (
            self.student_weights
            + self.gradients
            + self.optimizer
            + self.teacher_weights
            + self.gathered
            + self.activations
            + self.loss_buffers
        )


@contextmanager
def pretend_ranks(parallel: ParallelConfig) -> Iterator[World]:
    """Rank 0 of the ranks that a config asks for, in name only."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks, replicas = parallel.num_ranks(), parallel.dp_replicate
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        shape, names = (replicas, ranks // replicas), ("dp_replicate", "dp_shard")
        if replicas == 1:
            shape, names = shape[1:], names[1:]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        # More than one rank would start by sending weights, and there are none.
        yield World(mesh, torch.device("meta"), rank=0, size=1)
    finally:
        dist.destroy_process_group()


def make_plan(config: VlmKDConfig) -> Plan:
    """Build, freeze and shard both models without weights, and count."""
    with pretend_ranks(config.parallel) as world:
        model = config.student.meta_model()
        compute_bytes = DTYPES[config.parallel.compute_dtype].itemsize
        activations = kept_bytes(
            model,
            config.batching.tokens_at_once(config.train.micro_batch_size, config.data.max_length),
            compute_bytes,
            checkpointing=config.parallel.activation_checkpointing,
        )
        student = Student(model, config.loss.build(config.kd_ratio))
        student.freeze(config.student.freeze)
        student.adapt(config.student.lora, config.run.seed)
        whole = Whole.of(model)
        student.distribute(world, config.parallel)
        # Also checks the optimizer's choices.
        config.optim.build(student, config.train.max_steps)
        reduce_bytes = DTYPES[config.parallel.reduce_dtype].itemsize
        local_trained = sum(local(p).numel() for p in student.parameters() if p.requires_grad)
        unsharded_gradients = (
            whole.trained
            if config.train.grad_accum != 1 and not config.parallel.sync_every_micro_batch
            else 0
        )
        plan = Plan(
            ranks=config.parallel.num_ranks(),
            student_parameters=whole.parameters,
            trained_parameters=whole.trained,
            teacher_parameters=0,
            student_weights=local_bytes(student),
            gradients=4 * local_trained + reduce_bytes * unsharded_gradients,
            optimizer=8 * local_trained,
            teacher_weights=0,
            gathered=compute_bytes * (whole.root + 2 * whole.largest_block),
            activations=activations,
            loss_buffers=_loss_buffers(config, model),
            rows_per_step=config.train.global_batch_size or 0,
            tokens_per_step=(config.train.global_batch_size or 0) * config.data.max_length,
        )
        teacher = config.asked_teacher
        if isinstance(teacher, LocalTeacherConfig):
            _add_teacher(plan, teacher, config, world)
        return plan


def _add_teacher(
    plan: Plan, teacher: LocalTeacherConfig, config: VlmKDConfig, world: World
) -> None:
    model = teacher.meta_model()
    whole = Whole.of(model)
    vlm = FrozenVLM(model)
    vlm.distribute(world, config.parallel)
    plan.teacher_parameters = whole.parameters
    plan.teacher_weights = 0 if teacher.cpu_offload else local_bytes(vlm)
    compute_bytes = DTYPES[config.parallel.compute_dtype].itemsize
    plan.gathered += compute_bytes * (whole.root + 2 * whole.largest_block)


@dataclass
class Whole:
    """Parameters before sharding."""

    parameters: int
    trained: int
    largest_block: int
    root: int
    """In the root group, the head among them: whole on every rank during a step."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Whole:
        """Count those of a model."""
        groups = [*blocks(model)]
        embedding = model.get_input_embeddings()
        if embedding.weight is not model.get_output_embeddings().weight:
            groups.append(embedding)
        sizes = [sum(p.numel() for p in group.parameters()) for group in groups]
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(parameters, trained, max(sizes), parameters - sum(sizes))


def local(parameter: Tensor) -> Tensor:
    """The part of a rank."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_bytes(module: nn.Module) -> int:
    """Of all weights on a rank."""
    return sum(local(p).nbytes for p in module.parameters())


def _loss_buffers(config: VlmKDConfig, model: PreTrainedModel) -> int:
    """The chunk of logits, and the gradient of a head that is trained in float32."""
    device = torch.device(config.parallel.device_type())
    chunk_mib = config.loss.chunk_mib or default_budget_mib(device)
    head = model.get_output_embeddings().weight
    return chunk_mib * 2**20 + 4 * head.numel() * head.requires_grad


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
        "gathered blocks, embeddings and heads": plan.gathered,
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
