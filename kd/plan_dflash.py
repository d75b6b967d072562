"""What training a draft will take, counted without weights: `dry_run=true`."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from kd.config_dflash import DFlashConfig
from kd.dflash import Draft, Target
from kd.footprint import GIB, Whole, local_bytes, pretend_ranks
from kd.objective_loop import default_budget_mib
from kd.parallel import DTYPES, local


def print_plan(config: DFlashConfig) -> None:
    """Build and shard both models without weights, and print the counts as a table."""
    parallel = config.parallel
    with pretend_ranks(parallel) as world:
        model = config.target.meta_model()
        vocab = model.get_output_embeddings().weight.shape[0]
        # Which slot stands for MASK is found with the tokenizer, which is not there yet.
        draft_config = config.draft.resolve(model.config, vocab, mask_token_id=0)
        whole = Whole.of(model)
        target = Target(model, draft_config.dflash_config["target_layer_ids"])
        target.place(world, parallel, cpu_offload=config.target.cpu_offload)
        draft = Draft(draft_config).to("meta")
        draft_parameters = sum(p.numel() for p in draft.parameters())
        draft.distribute(world, parallel)
        config.optim.build(draft, config.train.max_steps)
        trained = sum(local(p).numel() for p in draft.parameters())
        compute_bytes = DTYPES[parallel.compute_dtype].itemsize
        num_tokens = config.train.micro_batch_size * config.data.max_length
        sizes = {
            "target weights (sharded)": 0 if config.target.cpu_offload else local_bytes(target),
            "gathered blocks, embeddings and heads": compute_bytes * whole.gathered_by(target),
            "draft weights (float32, sharded)": local_bytes(draft),
            "gradients": 4 * (trained + draft_parameters),
            "optimizer (AdamW, sharded)": 8 * trained,
            "tapped hidden states, longest rows": compute_bytes
            * num_tokens
            * len(draft.target_layer_ids)
            * draft_config.hidden_size,
            "loss buffers": default_budget_mib(torch.device(parallel.device_type())) * 2**20,
        }
    table = Table(title=f"{config.run.name}: plan", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("target parameters", f"{whole.parameters / 1e9:.3f} B")
    table.add_row("draft parameters, trained", f"{draft_parameters / 1e9:.3f} B")
    table.add_row("layers of the target tapped", str(draft.target_layer_ids))
    table.add_section()
    for name, size in {**sizes, "sum on each rank": sum(sizes.values())}.items():
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
