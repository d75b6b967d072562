"""`python -m kd.run` on a machine whose memory is full at one place: a stand-in for a GPU's.

    python -m tests.faults.full_memory KIND MODULE NAME CALL [kd.run's arguments]

The CALL-th call of NAME in MODULE (on the rank RANK_OF_FAULT) raises what torch raises there, in
its words: KIND is cuda, fragmented or host.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

import torch

from kd import run

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which {free} is free. Process 4711 has 8.00 GiB memory in use. Including non-PyTorch memory, "
    "this process has {process} memory in use. Of the allocated memory {allocated} is allocated by "
    "PyTorch, and {unused} is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
MESSAGES = {
    "cuda": CUDA.format(
        free="150.00 MiB", process="71.00 GiB", allocated="69.50 GiB", unused="512.00 MiB"
    ),
    "fragmented": CUDA.format(
        free="1.15 GiB", process="70.00 GiB", allocated="60.00 GiB", unused="9.00 GiB"
    ),
    "host": HOST,
}


def error(kind: str) -> RuntimeError:
    """What torch raises."""
    return (RuntimeError if kind == "host" else torch.OutOfMemoryError)(MESSAGES[kind])


def fail_at(kind: str, module: str, name: str, call: int) -> None:
    """Replace it."""
    *path, last = name.split(".")
    owner: Any = functools.reduce(getattr, path, importlib.import_module(module))
    own, calls = getattr(owner, last), 0

    @functools.wraps(own)
    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ.get("RANK", "0") == os.environ.get("RANK_OF_FAULT", "0"):
            raise error(kind)
        return own(*args, **kwargs)

    setattr(owner, last, full)


if __name__ == "__main__":
    fail_at(*sys.argv[1:4], int(sys.argv[4]))
    sys.argv[1:5] = []
    run.main()
