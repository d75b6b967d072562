"""torch.compile for the blocks of a language model."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from kd.parallel.world import ParallelConfig

log = logging.getLogger("kd")

MOST_GRAPHS = 64
"""Of all blocks together: transformers wraps their forwards in one function, whose graphs torch
counts as one. Two models, two kinds of layers, with and without gradients, a padding mask and a
second row make 32; torch's own limit is 8."""


def compile_blocks(layers: list[nn.Module], config: ParallelConfig) -> None:
    """Compile the forward of each, if the config asks for it."""
    if not config.compile:
        return
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    # Else torch runs what is beyond the limit uncompiled and says so to its developers alone.
    limits.fail_on_recompile_limit_hit = True
    for block in layers:
        _compile(block)


def _compile(block: nn.Module) -> None:
    """Its forward alone: FSDP2's hooks around it stay as they are."""
    # Dynamic: micro-batches differ in rows and length, and a graph is for all of them.
    plain, compiled = block.forward, torch.compile(block.forward, dynamic=True)
    given_up = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal given_up
        # Decoding would compile for every length, and caches are changed in place.
        if given_up or kwargs.get("past_key_values") is not None:
            return plain(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            given_up = True
            _tell_of_limit(type(block).__name__)
            return plain(*args, **kwargs)

    block.forward = forward


@functools.cache
def _tell_of_limit(name: str) -> None:
    log.warning(
        "warning: parallel.compile: torch has compiled %s for %d kinds of inputs, which is its "
        "limit; these blocks run uncompiled from now on\n"
        'TORCH_LOGS="recompiles" names the differences; parallel.compile=false compiles nothing',
        name,
        torch._dynamo.config.recompile_limit,
    )
