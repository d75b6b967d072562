"""What the blocks of a language model keep for the backward, counted from their modules.

An estimate, for kernels that keep no matrix of attention and no states of a linear one.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from kd.parallel import blocks

TOP_K = ("num_experts_per_tok", "moe_k")
FLOAT32_BYTES = 4


def kept_bytes(model: PreTrainedModel, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
    """Bytes that the decoder's blocks keep in a forward of `tokens` tokens.

    With checkpointing: the input of every block, and one block while it is recomputed.
    """
    text = model.config.get_text_config()
    values = text.to_dict()
    top_k = next((values[name] for name in TOP_K if values.get(name)), 1)
    kept = [kept_per_token(block, top_k, itemsize) for block in blocks(model.get_decoder())]
    if checkpointing:
        return tokens * (len(kept) * text.hidden_size * itemsize + max(kept))
    return tokens * sum(kept)


def kept_per_token(block: nn.Module, top_k: int, itemsize: int) -> int:
    """Bytes of one block, of whose experts a token sees `top_k`."""
    return sum(_kept_by(module, top_k, itemsize) for module in block.modules())


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
    for name, child in children.items():
        if isinstance(child, nn.Conv1d):
            kept += itemsize * (child.in_channels + child.out_channels)
        elif "Norm" in type(child).__name__:
            # Its input in float32, and that normalised; by head, it is all of a projection.
            projection = linears.get(f"{name[0]}_proj")
            (weight,) = child.parameters()
            size = weight.numel() if projection is None else projection.out_features
            kept += (FLOAT32_BYTES + itemsize) * size
    if not isinstance(module, (nn.Linear, nn.Conv1d)):
        own = list(module.parameters(recurse=False))
        kept += itemsize * sum(sum(weight.shape) for weight in own if weight.ndim == 2)  # a router
        experts = [size for weight in own if weight.ndim == 3 for size in weight.shape[1:]]
        kept += top_k * itemsize * (sum(experts) + min(experts, default=0))  # min: as of a gate
    return kept
