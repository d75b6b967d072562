"""A stand-in for NCCL, which needs GPUs: gloo over a TCPStore, on both sides of a transfer.

Nothing of NCCL itself, of ctypes or of CUDA streams is tested by it. The "unique id" is the address
of the store. Imports torch alone: a vLLM server loads it as a plugin.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=120)
LEFT: list[dist.ProcessGroupGloo] = []
"""Groups that were aborted, which gloo cannot: to destroy one waits for what is on its way."""


def _group(store: dist.Store, rank: int, size: int) -> dist.ProcessGroupGloo:
    group = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
    ones = torch.ones(1)
    group.allreduce(ones).wait()  # vLLM's ranks begin with the sum of one number
    assert ones.item() == size
    return group


class GlooCommunicator:
    """The trainer's side: the `Communicator` of kd/rollout/nccl.py."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.unique_id = f"127.0.0.1:{self.store.port}".encode().ljust(128, b"\0")
        self.group: dist.ProcessGroupGloo | None = None
        self.aborted = False

    def join(self, num_ranks: int) -> None:
        self.group = _group(self.store, 0, num_ranks)

    def broadcast(self, buffer: Tensor) -> Callable[[], bool]:
        assert self.group is not None and buffer.dtype == torch.uint8
        return self.group.broadcast(buffer, 0).is_completed

    def abort(self) -> None:
        if self.group is not None:
            LEFT.append(self.group)
        self.aborted, self.group = True, None


class Worker:
    """The server's side, as vLLM's `PyNcclCommunicator` is used."""

    def __init__(self, unique_id: bytes, rank: int, world_size: int) -> None:
        host, port = unique_id.rstrip(b"\0").decode().split(":")
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        self.group = _group(store, rank, world_size)

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        self.group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        self.group = None


def register() -> None:
    """As a plugin of vLLM: its packed transfer without NCCL and CUDA, all else as it is."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    class NoStream:
        def synchronize(self) -> None:
            pass

    def join(info: Any, parallel: Any) -> Worker:
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        return Worker(info.nccl_unique_id_bytes, rank + info.rank_offset, info.world_size)

    nccl_engine.worker_init_process_group = join
    packed_tensor._get_streams = lambda index, number: (NoStream(),) * number
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda *device: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
