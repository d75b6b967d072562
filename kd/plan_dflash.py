"""What training a draft will take, counted without weights: `dry_run=true`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from kd.config_dflash import DFlashConfig
from kd.dflash import Draft, Target
from kd.footprint import GIB, Whole, local_bytes, pretend_ranks
from kd.objective_loop import default_budget_mib
from kd.parallel import DTYPES, Reduction, World, choose_reduction, local


@dataclass
class DraftPlan:
    """Counts for one rank of a run."""

    target_parameters: int
    draft_parameters: int
    target_layer_ids: list[int]
    sizes: dict[str, int]
    """Bytes, by what takes them."""

    @property
    def total(self) -> int:
        """Bytes on one rank."""
        return sum(self.sizes.values())


def make_plan(config: DFlashConfig) -> DraftPlan:
    """Build and shard both models without weights, and count."""
    train, parallel = config.train, config.parallel
    assert train.micro_batch_size is not None  # of a checked config
    once = train.grad_accum != 1 and not reduction(config).every
    with pretend_ranks(parallel) as world:
        model = config.target.meta_model()
        vocab = model.get_output_embeddings().weight.shape[0]
        # Which slot stands for MASK is found with the tokenizer, which is not there yet.
        draft_config = config.draft.resolve(model.config, vocab, mask_token_id=0)
        target = Target(model, draft_config.dflash_config["target_layer_ids"])
        whole = Whole.of(model)  # once it is frozen, as its tower is one group then
        target.place(world, parallel, cpu_offload=config.target.cpu_offload)
        draft = Draft(draft_config).to("meta")
        draft_parameters = sum(p.numel() for p in draft.parameters())
        draft.distribute(world, parallel)
        config.optim.build(draft, train.max_steps)
        trained = sum(local(p).numel() for p in draft.parameters())
        compute_bytes = DTYPES[parallel.compute_dtype].itemsize
        num_tokens = train.micro_batch_size * config.data.max_length
        sizes = {
            "target weights (sharded)": 0 if config.target.cpu_offload else local_bytes(target),
            "gathered blocks, embeddings and heads": compute_bytes * whole.gathered_by(target),
            "draft weights (float32, sharded)": local_bytes(draft),
            "gradients": 4 * (trained + draft_parameters * once),
            "optimizer (AdamW, sharded)": 8 * trained,
            "tapped hidden states, longest rows": compute_bytes
            * num_tokens
            * len(draft.target_layer_ids)
            * draft_config.hidden_size,
            "loss buffers": default_budget_mib(torch.device(parallel.device_type())) * 2**20,
        }
        return DraftPlan(whole.parameters, draft_parameters, draft.target_layer_ids, sizes)


def reduction(config: DFlashConfig) -> Reduction:
    """When gradients are reduced over the ranks."""
    once = replace(config, parallel=replace(config.parallel, sync_every_micro_batch=False))
    return choose_reduction(config.parallel, lambda: make_plan(once).total)


def sync_every_micro_batch(config: DFlashConfig, world: World) -> bool:
    """What `parallel.sync_every_micro_batch` comes to: the same on every rank. Collective."""
    with torch.random.fork_rng(devices=[]):  # building a model to be measured draws nothing
        chosen = reduction(config)
    return chosen.agreed(world, accumulates=config.train.grad_accum != 1)


def print_plan(config: DFlashConfig) -> None:
    """Print the counts as a table."""
    plan = make_plan(config)
    table = Table(title=f"{config.run.name}: plan", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("target parameters", f"{plan.target_parameters / 1e9:.3f} B")
    table.add_row("draft parameters, trained", f"{plan.draft_parameters / 1e9:.3f} B")
    table.add_row("layers of the target tapped", str(plan.target_layer_ids))
    table.add_section()
    for name, size in {**plan.sizes, "sum on each rank": plan.total}.items():
        table.add_row(name, f"{size / GIB:.2f} GiB")
    table.add_section()
    table.add_row("rows per optimizer step", f"{config.train.global_batch_size or 0:,}")
    table.add_row("blocks per row, at most", f"{config.draft.num_anchors or 'all'}")
    table.add_row("optimizer steps", f"{config.train.max_steps:,}")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    console.print(
        "Checked: every config key and combination, both architectures, the taps, sharding and "
        "optimizer. Not counted: activations. Not checked: that weights, a slot for MASK and data "
        "can be reached."
    )
