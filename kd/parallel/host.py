"""Frozen weights that are on the device only while they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kd.parallel.shard import local


class HostWeights:
    """Parameters and buffers of a module, of which one copy stays on the host.

    They are copied to the device for each use, and dropped there after it: never copied back, so
    nothing may write to them. The tensors remain the same, FSDP2's shards among them; only their
    memory comes and goes. Outside of `on_device` they must not be read.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        on_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        tensors = [*module.parameters(), *module.buffers()]
        for tensor in tensors:  # on a CPU, weights may be a file that is mapped into memory
            if not local(tensor).untyped_storage().resizable():
                tensor.data = tensor.data.clone()
        storages = {s.data_ptr(): s for s in (local(t).untyped_storage() for t in tensors)}
        self._pairs: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        for storage in storages.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
            self._pairs.append((host.untyped_storage().copy_(storage), storage))
            storage.resize_(0)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are there inside of it."""
        for host, storage in self._pairs:
            storage.resize_(host.nbytes())
        self._copy()
        try:
            yield
        finally:
            for module in self.module.modules():  # what is gathered would stay
                if isinstance(module, FSDPModule):
                    module.reshard()
            for _, storage in self._pairs:
                storage.resize_(0)

    def _copy(self) -> None:
        if self._stream is None:
            for host, storage in self._pairs:
                storage.copy_(host)
            return
        # The memory is from the compute stream, which may still use it for something else.
        compute = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for host, storage in self._pairs:
                storage.copy_(host, non_blocking=True)
        compute.wait_stream(self._stream)
