"""Copies to a device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def copier(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """What copies a tensor to `device`: to a GPU out of pinned memory, which it makes if need be.

    Out of other memory the host would wait for all that the GPU has been given to do before.
    """
    to_gpu = torch.device(device).type == "cuda"

    def copy(x: Tensor) -> Tensor:
        if not to_gpu or x.device.type != "cpu":
            return x.to(device)
        # The pinned copy may go at once: its allocator keeps the memory until it has been read.
        return x.pin_memory().to(device, non_blocking=True)  # pinned already: no copy

    return copy
