"""Rank 0 of an NCCL group whose other ranks are the workers of a vLLM server.

Not through torch.distributed: the workers join by the id alone, without a store between them and
the trainer. It begins as vLLM's `PyNcclCommunicator.from_unique_id_bytes` does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

ID_BYTES, UINT8, FLOAT32, SUM = 128, 1, 7, 0  # nccl.h


class Communicator(Protocol):
    """Rank 0 of a group."""

    unique_id: bytes
    """What the other ranks join by."""

    def join(self, num_ranks: int) -> None:
        """Wait until all ranks have joined."""
        ...

    def broadcast(self, buffer: Tensor) -> Callable[[], bool]:
        """Begin to send; the function given says whether `buffer` has left, and is free again."""
        ...

    def abort(self) -> None:
        """Leave the group, whatever is under way."""
        ...


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class NcclCommunicator:
    """By the NCCL library that torch has loaded, or that of KD_NCCL_SO_PATH."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where there is no library, RuntimeError where NCCL cannot start."""
        self.device = device
        self.library = ctypes.CDLL(os.environ.get("KD_NCCL_SO_PATH", "libnccl.so.2"))
        self.library.ncclGetErrorString.restype = ctypes.c_char_p
        self._comm: ctypes.c_void_p | None = None  # ended once: a second time is a crash
        self._stream: torch.cuda.Stream | None = None
        self._id = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(self._id))
        self.unique_id = bytes(self._id)

    def version(self) -> str:
        """Such as 2.29.7. Both sides need the same."""
        code = ctypes.c_int()
        self._call("ncclGetVersion", ctypes.byref(code))
        return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"

    def join(self, num_ranks: int) -> None:
        """See `Communicator`. Blocks without an end where a rank stays away."""
        with torch.cuda.device(self.device):
            comm = ctypes.c_void_p()
            ranks, rank = ctypes.c_int(num_ranks), ctypes.c_int(0)
            self._call("ncclCommInitRank", ctypes.byref(comm), ranks, self._id, rank)
            self._stream = torch.cuda.Stream(self.device)
            # vLLM's ranks begin with the sum of one number, and wait for ours.
            one = torch.zeros(1, device=self.device)
            self._stream.wait_stream(torch.cuda.current_stream())
            data, count = ctypes.c_void_p(one.data_ptr()), ctypes.c_size_t(1)
            stream = ctypes.c_void_p(self._stream.cuda_stream)
            self._call("ncclAllReduce", data, data, count, FLOAT32, SUM, comm, stream)
            self._stream.synchronize()
            self._comm = comm

    def broadcast(self, buffer: Tensor) -> Callable[[], bool]:
        """See `Communicator`. Goes on beside the current stream, after what that has done."""
        assert self._stream is not None and buffer.is_contiguous()
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            data, count = ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.nbytes)
            stream = ctypes.c_void_p(self._stream.cuda_stream)
            self._call("ncclBroadcast", data, data, count, UINT8, 0, self._comm, stream)
            sent = torch.cuda.Event()
            sent.record(self._stream)
        return sent.query

    def abort(self) -> None:
        """See `Communicator`."""
        comm, self._comm = self._comm, None
        if comm is not None:
            self._call("ncclCommAbort", comm)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: {self.library.ncclGetErrorString(code).decode()}")
