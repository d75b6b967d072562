"""What the blocks of a model keep for the backward, counted from their modules.

An estimate, for kernels that keep no matrix of attention and no states of a linear one; and what
transformers' gated delta rule in PyTorch keeps, where it is in the place of its kernel.
"""

from __future__ import annotations

import inspect
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from kd.model import Kernels, layer_functions
from kd.parallel import blocks

TOP_K = ("num_experts_per_tok", "moe_k")
FLOAT32_BYTES = 4
DELTA_RULE = "chunk_gated_delta_rule"
AROUND = 3
"""Hidden states beside a block's child while it runs: the residual, its norm, its input."""


def kept_bytes(
    model: PreTrainedModel,
    tokens: int,
    itemsize: int,
    *,
    checkpointing: bool,
    with_kernels: bool = False,
) -> int:
    """Bytes that the decoder's blocks keep in a forward of `tokens` tokens.

    With checkpointing: the input of every block, and one block while it is recomputed. As the
    layers run on this machine, or as where the kernels of linear attention are installed.
    """
    text = model.config.get_text_config()
    top_k = _top_k(model)
    kept = [
        kept_per_token(block, top_k, itemsize) + (0 if with_kernels else kept_in_torch(block))
        for block in blocks(model.get_decoder())
    ]
    if checkpointing:
        return tokens * (len(kept) * text.hidden_size * itemsize + max(kept))
    return tokens * sum(kept)


def _top_k(model: PreTrainedModel) -> int:
    values = model.config.get_text_config().to_dict()
    return next((values[name] for name in TOP_K if values.get(name)), 1)


def read_per_token(model: PreTrainedModel, itemsize: int) -> int:
    """Bytes while a block runs that has no backward: of its largest child, and around it."""
    text = model.config.get_text_config()
    children = [child for block in blocks(model.get_decoder()) for child in block.children()]
    largest = max(kept_per_token(child, _top_k(model), itemsize) for child in children)
    return largest + AROUND * text.hidden_size * itemsize


def kept_per_token(block: nn.Module, top_k: int, itemsize: int) -> int:
    """Bytes of one block, of whose experts a token sees `top_k`."""
    return sum(_kept_by(module, top_k, itemsize) for module in block.modules())


def kept_in_torch(block: nn.Module) -> int:
    """Bytes per token that a gated delta rule of `block` keeps beyond its kernel.

    0: there is none, or it runs as its kernel. A row is padded to whole chunks.
    """
    return sum(
        _kept_by_chunks(module, inspect.signature(function.plain).parameters["chunk_size"].default)
        for module in block.modules()
        for function in layer_functions(type(module))
        if function.name == DELTA_RULE and not function.fused
    )


def torch_note(model: PreTrainedModel, tokens: int) -> str | None:
    """What a plan should say of a student whose linear attention lacks its kernels here, on rows
    of so many tokens; None: it does not.
    """
    kernels = Kernels.of(model)
    if not kernels.recurs_in_torch:
        return None
    most = tokens * max(kept_in_torch(block) for block in blocks(model.get_decoder()))
    counted = f"It keeps {most / 2**30:.2f} GiB more for a row in each such layer, counted above"
    if not most:
        counted = "What it keeps is not counted"
    return f"The student's {kernels.finding}, here. {counted}. To have the kernels: {kernels.fix}"


def _kept_by_chunks(module: nn.Module, chunk: int) -> int:
    """Per token: of each head, in float32."""
    sizes = module.num_v_heads, module.head_k_dim, module.head_v_dim
    heads, keys, values = cast(tuple[int, int, int], sizes)
    # Queries and keys before and after they are normalised, keys by strength, those that the old
    # state is read with, and both by decay: 8. Values, the new ones, and those less what was known.
    vectors = 8 * keys + 3 * values
    # In a chunk: decays, both products with keys, each of them by the decays.
    matrices = 5 * chunk
    state = keys * values // chunk
    scalars = 6  # strength, two norms, three exponentials of the decay
    return FLOAT32_BYTES * heads * (vectors + matrices + state + scalars)


def _kept_by(module: nn.Module, top_k: int, itemsize: int) -> int:
    """What `module` does with its own projections, convolutions, norms and experts."""
    children = dict(module.named_children())
    linears = {name: m for name, m in children.items() if isinstance(m, nn.Linear)}
    # Projections beside each other read the same input, of which there is one of each size.
    inputs = {linear.in_features for linear in linears.values()}
    outputs = [linear.out_features for linear in linears.values()]
    kept = itemsize * (sum(inputs) + sum(outputs))
    if "q_proj" not in linears:  # a gated feed-forward: the gate after its activation
        kept += itemsize * sum(size for size in inputs if outputs.count(size) > 1)
    if "qkv" in linears:  # cut in three, of which two are turned by the rotary embedding
        kept += itemsize * 2 * linears["qkv"].out_features // 3
    for name, child in children.items():
        if isinstance(child, nn.Conv1d):
            kept += itemsize * (child.in_channels + child.out_channels)
        elif isinstance(child, nn.LayerNorm):  # of vision towers: its input alone
            kept += itemsize * child.normalized_shape[-1]
        elif "Norm" in type(child).__name__:
            # Its input in float32, and that normalised; by head, it is all of a projection.
            projection = linears.get(f"{name[0]}_proj")
            (weight,) = child.parameters()
            size = weight.numel() if projection is None else projection.out_features
            if name == "norm" and "out_proj" in linears:  # of all heads; its gate keeps as much
                size = 2 * linears["out_proj"].in_features
            kept += (FLOAT32_BYTES + itemsize) * size
    if not isinstance(module, (nn.Linear, nn.Conv1d)):
        own = list(module.parameters(recurse=False))
        kept += itemsize * sum(sum(weight.shape) for weight in own if weight.ndim == 2)  # a router
        experts = [size for weight in own if weight.ndim == 3 for size in weight.shape[1:]]
        kept += top_k * itemsize * (sum(experts) + min(experts, default=0))  # min: as of a gate
    return kept
