"""A stream of weights cut into buffers as vLLM's packed transfer cuts it.

The receiver (`packed_nccl_broadcast_consumer` of vLLM 0.32) is given names, types, shapes and a
size in bytes, and works out by itself where each buffer ends: after the tensor with which it grows
beyond that size. A buffer is the bytes of its tensors one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kd.model import TensorSpec, WeightStream
from kd.types import UserError


def cut(specs: Iterable[TensorSpec], buffer_bytes: int) -> list[list[TensorSpec]]:
    """The tensors of each buffer. Raises UserError for those that a receiver could not read."""
    buffers: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if filled > buffer_bytes:
            buffers.append([])
            filled = 0
        if filled % spec.dtype.itemsize:
            raise UserError(
                f"{spec.name} ({spec.dtype}) begins in the middle of a number, where vLLM cannot "
                "read it: set rollout.engine.transfer=disk"
            )
        buffers[-1].append(spec)
        filled += spec.num_bytes
    return buffers


def packed(stream: WeightStream, buffer_bytes: int, device: torch.device) -> Iterator[Tensor]:
    """Filled buffers (uint8) on rank 0, nothing on the others. Collective.

    Each has memory of its own: whoever keeps one buffer while the next is filled holds two.
    """
    pairs = iter(stream)
    if not stream.world.is_main:
        for _ in pairs:
            pass
        return
    for specs in cut(stream.specs, buffer_bytes):
        size = sum(spec.num_bytes for spec in specs)
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        for place, spec in zip(buffer.split([s.num_bytes for s in specs]), specs, strict=True):
            place.view(spec.dtype).view(spec.shape).copy_(next(pairs)[1])
        yield buffer
    assert next(pairs, None) is None
