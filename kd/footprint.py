"""What a config will take, counted without weights: `dry_run=true`, and `kd.plan`.

Both models are built on the meta device and sharded over a process group that exists in name only,
so the bytes of weights and optimizer are those of rank 0, exactly. Activations are an estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from kd.activations import FLOAT32_BYTES, kept_bytes, read_per_token, torch_note
from kd.config import VlmKDConfig
from kd.loss import AlignedLossConfig
from kd.memory_estimate import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    TEACHER,
    WEIGHTS,
    Plan,
    add_parts,
)
from kd.model import FrozenVLM, Student
from kd.objective_loop import default_budget_mib
from kd.parallel import (
    DTYPES,
    ParallelConfig,
    Reduction,
    World,
    choose_reduction,
    local,
)
from kd.sharded import Gathered, Whole, local_bytes
from kd.teacher import LocalTeacherConfig, ServerTeacherConfig
from kd.vision_activations import Tower, patches_of_row


@dataclass(frozen=True)
class Kept:
    """Bytes that the backward of a model needs, or the forward of one that has none."""

    per_token: int
    per_patch: int = 0
    """Of the vision tower, where it is trained."""
    patches: int = 0
    """Of a longest row."""

    def bytes(self, tokens: int, row_tokens: int) -> int:
        """Of so many tokens, in rows of `row_tokens`."""
        rows = -(-tokens // row_tokens)
        return self.per_token * tokens + self.per_patch * self.patches * rows


@dataclass(frozen=True)
class Sizes:
    """Of a model that is sharded over the ranks of a config."""

    whole: Whole
    gathered: Gathered
    weights: int
    """Bytes of a rank."""
    trained: int
    """Numbers of a rank."""
    kept: Kept
    kept_by_checkpoints: Kept
    """With activation checkpointing."""


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
        sizes = measure(config, world)
    head = served_head(config)
    plan = footprint(config, *sizes, head or 0)
    missing = [] if head is not None else ["the head that the teacher's servers send"]
    return dataclasses.replace(plan, not_counted=missing)


def served_head(config: VlmKDConfig) -> int | None:
    """Numbers of the head that a teacher's servers send; 0: none; None: it is not known here."""
    asked = config.asked_teacher
    return asked.head_numbers() if isinstance(asked, ServerTeacherConfig) else 0


def measure(
    config: VlmKDConfig, world: World, *, with_kernels: bool = False
) -> tuple[Sizes, Sizes | None]:
    """The student, and the teacher if it is on the same ranks; `world` is of the meta device.

    Activations as on this machine, or as where the kernels of linear attention are installed.
    """
    parallel = config.parallel
    model = config.student.meta_model()
    kept = _Counter(config, model, with_kernels=with_kernels)
    student = Student(model, config.loss.build(config.kd_ratio))
    student.freeze(config.student.freeze)
    student.adapt(config.student.lora, config.run.seed)
    whole = Whole.of(model)
    both = [kept.by_student(checkpointing=some) for some in (False, True)]
    student.place(world, parallel, cpu_offload=parallel.cpu_offload)
    # Also checks the optimizer's choices.
    config.optim.build(student, config.train.max_steps)
    trained = sum(local(p).numel() for p in student.parameters() if p.requires_grad)
    gathered = whole.gathered(student, parallel)
    mine = Sizes(whole, gathered, local_bytes(student), trained, *both)
    asked = config.asked_teacher
    if not isinstance(asked, LocalTeacherConfig):
        return mine, None
    model = asked.meta_model()
    # Without gradients, layers without their kernels keep nothing either.
    read = _Counter(config, model, with_kernels=True).by_teacher()
    vlm = FrozenVLM(model)
    whole = Whole.of(model)  # once it is frozen, as its tower is one group then
    vlm.place(world, parallel, cpu_offload=asked.cpu_offload)
    gathered = whole.gathered(vlm, parallel)
    return mine, Sizes(whole, gathered, local_bytes(vlm), 0, read, read)


class _Counter:
    """Of activations, before there are adapters."""

    def __init__(self, config: VlmKDConfig, model: PreTrainedModel, *, with_kernels: bool) -> None:
        self.itemsize = DTYPES[config.parallel.compute_dtype].itemsize
        self.width = model.config.get_text_config().hidden_size
        self.read = read_per_token(model, self.itemsize)
        self.text = [
            kept_bytes(model, 1, self.itemsize, checkpointing=some, with_kernels=with_kernels)
            for some in (False, True)
        ]
        self.tower = Tower(model, self.itemsize)
        self.patches = patches_of_row(model, config.student.processor, config.data.max_length)

    def by_student(self, *, checkpointing: bool) -> Kept:
        """Beside the blocks: embeddings, and the final norm with its input in float32."""
        ends = (4 + 2 * self.itemsize) * self.width
        per_patch = self.tower.kept_per_patch(checkpointing=checkpointing)
        return Kept(self.text[checkpointing] + ends, per_patch, self.patches)

    def by_teacher(self) -> Kept:
        """It has no backward."""
        return Kept(self.read)


def footprint(
    config: VlmKDConfig, student: Sizes, teacher: Sizes | None, served_head: int = 0
) -> Plan:
    """Of a config whose models and ranks have these sizes.

    `served_head`: numbers of the head of a teacher that is elsewhere, which servers send.
    """
    train, on_device = config.train, not config.parallel.cpu_offload
    tokens = config.batching.tokens_at_once(train.micro_batch_size, config.data.max_length)
    held = {
        WEIGHTS: student.weights * on_device,
        OPTIMIZER: 2 * FLOAT32_BYTES * student.trained * on_device,
    }
    chosen = reduction(config, lambda once: footprint(once, student, teacher, served_head))
    between, after = _gradients(config, student, every=chosen.every)
    itemsize = DTYPES[config.parallel.compute_dtype].itemsize
    stays, whole_teacher, moments = itemsize * served_head, 0, {}
    if teacher is not None:
        here, stays, is_offloaded = _teacher_bytes(config, teacher, tokens)
        whole_teacher = 0 if is_offloaded else teacher.gathered.root
        moments["the teacher's forward"] = held | {
            # One that leaves the device has read all of the step before there are any.
            GRADIENTS: 0 if is_offloaded else between,
            TEACHER: here,
            GATHERED: teacher.gathered.root + max(teacher.gathered.start, teacher.gathered.blocks),
            ACTIVATIONS: teacher.kept.bytes(tokens, config.data.max_length),
            LOSS: 0,
        }
    checkpoints = config.parallel.activation_checkpointing
    kept = student.kept_by_checkpoints if checkpoints else student.kept
    mine, head = student.gathered, itemsize * student.whole.trained_head
    moments["the loss, and the start of the backward"] = held | {
        GRADIENTS: between,
        TEACHER: stays,
        GATHERED: whole_teacher + mine.root + mine.blocks + mine.block_gradients,
        ACTIVATIONS: kept.bytes(tokens, config.data.max_length),
        LOSS: _loss_bytes(config, student, teacher, tokens),
    }
    moments["the end of the backward"] = held | {
        GRADIENTS: after,
        TEACHER: stays,
        GATHERED: whole_teacher + mine.root + mine.end_gradients,
        ACTIVATIONS: 0,
        # The head's gradient, and beside it what the embedding adds if it is the same weight.
        LOSS: head * (mine.root == 0) + head * student.whole.tied,
    }
    rows = train.global_batch_size or 0
    return Plan(
        ranks=config.parallel.num_ranks(),
        student_parameters=student.whole.parameters,
        trained_parameters=student.whole.trained,
        teacher_parameters=0 if teacher is None else teacher.whole.parameters,
        rows_per_step=rows,
        tokens_per_step=rows * config.data.max_length,
        moments=moments,
    )


def _teacher_bytes(config: VlmKDConfig, teacher: Sizes, tokens: int) -> tuple[int, int, bool]:
    """Of a local teacher while it reads, and while the student learns; whether it has left then."""
    asked, itemsize = config.asked_teacher, DTYPES[config.parallel.compute_dtype].itemsize
    assert isinstance(asked, LocalTeacherConfig)
    of_token = itemsize * (teacher.whole.head // teacher.whole.vocab)
    weights = 0 if asked.cpu_offload else teacher.weights
    if not asked.offload:
        return weights, weights + of_token * tokens, False
    # It reads all micro-batches of the step at once; of it, the head stays.
    rows = (config.train.global_batch_size or 0) // config.parallel.num_ranks()
    states = of_token * rows * config.data.max_length
    head = itemsize * teacher.whole.head
    return weights + head + states, head + states, True


def accumulates(config: VlmKDConfig) -> bool:
    """Whether an optimizer step may take several micro-batches."""
    rows, micro_batches = config.train.micro_batch_size, config.train.grad_accum
    assert rows is not None  # of a checked config
    return config.batching.accumulates(rows, micro_batches)


def reduction(config: VlmKDConfig, estimate: Callable[[VlmKDConfig], Plan]) -> Reduction:
    """When gradients are reduced; `estimate` is asked where the memory decides."""
    parallel = dataclasses.replace(config.parallel, sync_every_micro_batch=False)
    once = dataclasses.replace(config, parallel=parallel)
    return choose_reduction(config.parallel, lambda: estimate(once).total)


def sync_every_micro_batch(config: VlmKDConfig, world: World) -> bool:
    """What `parallel.sync_every_micro_batch` comes to: the same on every rank. Collective."""
    meta, head = without_memory(world), served_head(config) or 0
    with torch.random.fork_rng(devices=[]):  # building a model to be measured draws nothing
        chosen = reduction(config, lambda once: footprint(once, *measure(once, meta), head))
    return chosen.agreed(world, accumulates=accumulates(config))


def without_memory(world: World) -> World:
    """The ranks of a run, for counting on the meta device."""
    return dataclasses.replace(world, device=torch.device("meta"), size=1)


def _gradients(config: VlmKDConfig, student: Sizes, *, every: bool) -> tuple[int, int]:
    """Bytes between two micro-batches of a step, reduced after `every` one, and after the last."""
    parallel = config.parallel
    after = 0 if parallel.cpu_offload else FLOAT32_BYTES * student.trained
    if not accumulates(config):
        return 0, after
    if student.gathered.root and not every:
        # FSDP2 keeps them whole, on the device.
        return DTYPES[parallel.reduce_dtype].itemsize * student.whole.trained, after
    return after, after


def _loss_bytes(config: VlmKDConfig, student: Sizes, teacher: Sizes | None, tokens: int) -> int:
    """The logits that exist at once, and the gradient of a head that is trained.

    That is in float32 first, and then also in the precision of the weights.
    """
    itemsize = DTYPES[config.parallel.compute_dtype].itemsize
    narrow = itemsize if itemsize < FLOAT32_BYTES else 0
    device = torch.device(config.parallel.device_type())
    chunk = 2**20 * (config.loss.chunk_mib or default_budget_mib(device))
    if config.asked_teacher.is_dense and not isinstance(config.loss, AlignedLossConfig):
        vocab = student.whole.vocab
        body = config.loss.meta_body(config.kd_ratio, teacher.whole.vocab if teacher else vocab)
        # A GPU reads the gradient of the logits in the precision of the head.
        apart = device.type == "cuda" and not body.narrows_in_place
        row = vocab * (FLOAT32_BYTES + narrow * apart) + body.row_bytes(vocab)
        chunk = min(max(row, chunk), tokens * row)
    head = student.whole.trained_head
    return FLOAT32_BYTES * head + max(chunk, narrow * head)


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
    names = {
        WEIGHTS: f"{WEIGHTS} ({config.student.dtype}, sharded)",
        OPTIMIZER: "optimizer (AdamW, sharded)",
        TEACHER: "teacher weights (sharded)",
        ACTIVATIONS: "activations (estimate, longest rows)",
    }
    add_parts(table, plan.parts, names)
    table.add_section()
    table.add_row("rows per optimizer step", f"{plan.rows_per_step:,}")
    table.add_row("tokens per step, at most", f"{plan.tokens_per_step:,}")
    table.add_row("optimizer steps", f"{config.train.max_steps:,}")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    console.print(f"Bytes are those at the peak of a step: {plan.peak}.")
    for missing in plan.not_counted:
        console.print(f"Not counted: {missing}.")
    console.print(
        "Checked: every config key and combination, both architectures, sharding, optimizer and "
        "loss. Not checked: that weights, processors and data can be reached."
    )
    note = torch_note(config.student.meta_model(), config.data.max_length)
    if note:
        console.print(note)
