"""What training a draft will take, counted without weights: `dry_run=true`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from kd.activations import FLOAT32_BYTES, kept_per_token
from kd.config_dflash import DFlashConfig
from kd.dflash import Draft, Target
from kd.footprint import pretend_ranks, without_memory
from kd.memory_estimate import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    MemoryOption,
    Plan,
    add_parts,
)
from kd.objective_loop import default_budget_mib
from kd.parallel import DTYPES, Reduction, World, choose_reduction, local
from kd.sharded import Gathered, Group, Whole, gathered, local_bytes

TARGET, DRAFT = "target weights", "draft weights"
STATES = "hidden states of the target that the draft reads"


@dataclass(frozen=True)
class Sizes:
    """Of both models, sharded over the ranks of a config; bytes of a rank unless said otherwise."""

    target: Whole
    target_weights: int
    target_gathered: Gathered
    draft: Draft
    parameters: int
    """Numbers of the draft."""
    trained: int
    """Numbers of a rank."""
    gathered: Gathered


def make_plan(config: DFlashConfig) -> Plan:
    """Build and shard both models without weights, and count."""
    with pretend_ranks(config.parallel) as world:
        return count(config, measure(config, world))


def measure(config: DFlashConfig, world: World) -> Sizes:
    """On the ranks of `world`, which is of the meta device."""
    parallel, model = config.parallel, config.target.meta_model()
    vocab = model.get_output_embeddings().weight.shape[0]
    # Which slot stands for MASK is found with the tokenizer, which is not there yet.
    draft_config = config.draft.resolve(model.config, vocab, mask_token_id=0)
    target = Target(model, draft_config.dflash_config["target_layer_ids"])
    whole = Whole.of(model)
    target.place(world, parallel, cpu_offload=config.target.cpu_offload)
    draft = Draft(draft_config).to("meta")
    parameters, layer = Group.of(draft), Group.of(draft.layers[0])
    rest = parameters.parameters - len(draft.layers) * layer.parameters
    draft.distribute(world, parallel)
    config.optim.build(draft, config.train.max_steps)
    return Sizes(
        whole,
        local_bytes(target),
        whole.gathered(target, parallel),
        draft,
        parameters.parameters,
        sum(local(p).numel() for p in draft.parameters()),
        gathered(layer, Group(), Group(rest, rest), parallel),
    )


def count(config: DFlashConfig, sizes: Sizes) -> Plan:
    """Of a config whose models and ranks have these sizes."""
    train, target, draft = config.train, sizes.target_gathered, sizes.gathered
    on_device = not config.parallel.cpu_offload
    held = {
        TARGET: 0 if config.target.cpu_offload else sizes.target_weights,
        DRAFT: FLOAT32_BYTES * sizes.trained * on_device,
        OPTIMIZER: 2 * FLOAT32_BYTES * sizes.trained * on_device,
    }
    every = reduction(config, lambda once: count(once, sizes)).every
    between, after = _gradients(config, sizes, every=every)
    width = sizes.draft.config.hidden_size * len(sizes.draft.target_layer_ids)
    size = DTYPES[config.parallel.compute_dtype].itemsize
    states = size * rows_at_once(config) * config.data.max_length * width
    whole = target.root + draft.root
    moments = {
        # The layers' states are there twice while they are joined.
        "the target's forward": held
        | {GRADIENTS: between, STATES: 2 * states}
        | {GATHERED: target.root + max(target.start, target.blocks)},
        "the loss, and the start of the backward": held
        | {
            GRADIENTS: between,
            STATES: states,
            GATHERED: whole + draft.blocks + draft.block_gradients,
        }
        | {ACTIVATIONS: kept_bytes(config, sizes.draft), LOSS: loss_bytes(config, sizes)},
        "the end of the backward": held
        | {GRADIENTS: after, STATES: states, GATHERED: whole + draft.end_gradients},
    }
    rows, ranks = train.global_batch_size or 0, config.parallel.num_ranks()
    numbers = ranks, sizes.parameters, sizes.parameters, sizes.target.parameters
    return Plan(*numbers, rows, rows * config.data.max_length, moments)


def reduction(config: DFlashConfig, estimate: Callable[[DFlashConfig], Plan]) -> Reduction:
    """When gradients are reduced; `estimate` is asked where the memory decides."""
    parallel = dataclasses.replace(config.parallel, sync_every_micro_batch=False)
    once = dataclasses.replace(config, parallel=parallel)
    return choose_reduction(config.parallel, lambda: estimate(once).total)


def sync_every_micro_batch(config: DFlashConfig, world: World) -> bool:
    """What `parallel.sync_every_micro_batch` comes to: the same on every rank. Collective."""
    meta = without_memory(world)
    with torch.random.fork_rng(devices=[]):  # building a model to be measured draws nothing
        chosen = reduction(config, lambda once: count(once, measure(once, meta)))
    return chosen.agreed(world, accumulates=config.train.grad_accum != 1)


def _gradients(config: DFlashConfig, sizes: Sizes, *, every: bool) -> tuple[int, int]:
    """Bytes between two micro-batches of a step, reduced after `every` one, and after the last."""
    parallel = config.parallel
    after = 0 if parallel.cpu_offload else FLOAT32_BYTES * sizes.trained
    if config.train.grad_accum == 1:
        return 0, after
    if not every:
        return DTYPES[parallel.reduce_dtype].itemsize * sizes.parameters, after
    return after, after


def options(config: DFlashConfig, world: World) -> tuple[Plan, list[MemoryOption]]:
    """The config's own plan, and what can be changed in a run that has begun.

    Counted on the ranks of the run, without memory of their devices.
    """
    sizes = measure(config, without_memory(world))
    assert config.train.grad_accum is not None and config.train.micro_batch_size is not None
    rows_of_a_rank = config.train.micro_batch_size * config.train.grad_accum
    plan, mine, overrides, found = count(config, sizes), copy.deepcopy(config), [], []

    def option() -> MemoryOption:
        its = copy.deepcopy(mine)

        def plan(rows: int) -> Plan:
            its.train.micro_batch_size, its.train.grad_accum = rows, rows_of_a_rank // rows
            return count(its, sizes)

        return MemoryOption(list(overrides), plan)

    found.append(option())
    for group, key in (
        (mine.parallel, "parallel.sync_every_micro_batch"),
        (mine.target, "target.cpu_offload"),
        (mine.parallel, "parallel.cpu_offload"),
    ):
        if not getattr(group, key.split(".")[1]):
            setattr(group, key.split(".")[1], True)
            overrides.append(f"{key}=true")
            found.append(option())
    return plan, found


def rows_at_once(config: DFlashConfig) -> int:
    """Those of a micro-batch."""
    assert config.train.micro_batch_size is not None  # settled when the config was checked
    return config.train.micro_batch_size


def positions(config: DFlashConfig) -> int:
    """Those of the draft in a micro-batch of longest rows."""
    length = config.data.max_length
    blocks = min(config.draft.num_anchors or length, length)
    return rows_at_once(config) * blocks * config.draft.block_size


def kept_bytes(config: DFlashConfig, draft: Draft) -> int:
    """What the draft keeps for its backward: of the blocks, and of the context that they see."""
    size = DTYPES[config.parallel.compute_dtype].itemsize
    tokens, places = rows_at_once(config) * config.data.max_length, positions(config)
    width, layer = draft.config.hidden_size, draft.layers[0]
    keys = config_keys(draft)
    of_place = kept_per_token(layer, 1, size)
    # Keys, also before their norm and in float32, values, and both again beside the blocks'.
    of_token = (3 * size + FLOAT32_BYTES) * keys + 2 * size * keys
    ends = places * (2 * size + FLOAT32_BYTES) * width + tokens * (2 * size + FLOAT32_BYTES) * width
    return len(draft.layers) * (places * (of_place + 2 * size * keys) + tokens * of_token) + ends


def config_keys(draft: Draft) -> int:
    """Numbers of a token's keys in a layer."""
    assert draft.config.head_dim is not None and draft.config.num_key_value_heads is not None
    return draft.config.num_key_value_heads * draft.config.head_dim


def loss_bytes(config: DFlashConfig, sizes: Sizes) -> int:
    """The logits that exist at once, and the gradient of the hidden states."""
    device, size = config.parallel.device_type(), DTYPES[config.parallel.compute_dtype].itemsize
    copied = size if device == "cuda" and size < FLOAT32_BYTES else 0
    places, row = positions(config), sizes.target.vocab * (FLOAT32_BYTES + copied)
    chunk = min(default_budget_mib(torch.device(device)) * 2**20, places * row)
    return chunk + places * FLOAT32_BYTES * sizes.draft.config.hidden_size


def print_plan(config: DFlashConfig) -> None:
    """Print the counts as a table."""
    with pretend_ranks(config.parallel) as world:
        sizes = measure(config, world)
    plan = count(config, sizes)
    table = Table(title=f"{config.run.name}: plan", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("target parameters", f"{plan.teacher_parameters / 1e9:.3f} B")
    table.add_row("draft parameters, trained", f"{plan.trained_parameters / 1e9:.3f} B")
    table.add_row("layers of the target tapped", str(sizes.draft.target_layer_ids))
    table.add_section()
    names = {
        TARGET: f"{TARGET} (sharded)",
        DRAFT: f"{DRAFT} (float32, sharded)",
        OPTIMIZER: "optimizer (AdamW, sharded)",
        ACTIVATIONS: "activations (estimate, longest rows)",
    }
    add_parts(table, plan.parts, names)
    table.add_section()
    table.add_row("rows per optimizer step", f"{plan.rows_per_step:,}")
    table.add_row("blocks per row, at most", f"{config.draft.num_anchors or 'all'}")
    table.add_row("optimizer steps", f"{config.train.max_steps:,}")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    console.print(f"Bytes are those at the peak of a step: {plan.peak}.")
    console.print(
        "Checked: every config key and combination, both architectures, the layers that are read, "
        "sharding and optimizer. Not checked: that weights, a slot for MASK and data can be "
        "reached."
    )
