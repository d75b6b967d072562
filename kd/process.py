"""What holds for every process of kd, settled before torch is imported (by `import kd`).

Threads that wait for others go to sleep soon, kernels for other instructions are not mixed up, the
pieces of a GPU's memory can grow, and a process whose environment names another one in
`KD_PARENT_PID` ends when that one has ended, however it died. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARENT = "KD_PARENT_PID"
"""The process that a child of it is to end with; taken out of the environment by the child."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How long OpenMP's threads spin before they sleep: any of these is the user's choice."""
SPIN_COUNT = 1500
"""Of GNU's runtime, whose default of 300,000 keeps a core busy for milliseconds at each barrier."""
BLOCK_TIME_MS = 1
"""Of LLVM's and Intel's runtime, which have no finer unit in common; their default is 200."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""How torch allocates memory of a GPU: any of these is the user's choice."""

POLL_S = 0.5
PR_SET_PDEATHSIG = 1


def set_up() -> None:
    """Settle all of it; called by `import kd`, once for each process."""
    spin_briefly()
    expand_segments()
    keep_kernels_apart()
    parents = set()
    parent = os.environ.pop(PARENT, None)
    # A cluster's job has the environment of the process that submitted it, and outlives that one.
    if parent is not None and os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        if not parent.isdecimal():
            print(f"error: {PARENT}={parent}: give the id of a process, as $$", file=sys.stderr)
            raise SystemExit(2)
        parents.add(int(parent))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun itself does not see to it
        parents.add(os.getppid())
    for pid in parents:
        end_with(pid)


def spin_briefly() -> None:
    """Let OpenMP's idle threads sleep after a short spin, unless the user has chosen otherwise.

    The runtimes read it when they are loaded, so it must come before torch. A thread that spins
    while the one it waits for has no core takes that core away from it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        os.environ["KMP_BLOCKTIME"] = str(BLOCK_TIME_MS)


def expand_segments() -> None:
    """Let torch grow its pieces of a GPU's memory, unless the user has chosen otherwise.

    Micro-batches differ in size: of pieces that cannot grow, more and more are held that fit none.
    Torch reads it when it is loaded or first allocates, so it must come before torch.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        # By the name that torch has read since 2.9; the older ones have it warn.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def end_with(pid: int) -> None:
    """Kill this process as soon as process `pid`, its parent or one before it, has ended.

    By the kernel's parent-death signal where there is one, which also ends a process that hangs;
    else by a thread that watches. The signal comes when the *thread* that started this process
    ends: it must be one that lives as long as its process.
    """
    if os.getppid() == pid and _signal_on_parents_death():
        if os.getppid() != pid:  # it ended before the signal was asked for
            _end()
        return
    threading.Thread(target=_watch, args=(pid,), name="parent", daemon=True).start()


def keep_kernels_apart() -> None:
    """Give torch.compile a cache of its own where the user restricts the processor's instructions.

    What is cached is C++ for one width of vectors; torch compiles it for the width of the day, and
    kernels then write beyond the end of their results.
    """
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = f"torchinductor_{os.getuid()}_{capability}"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)


@contextmanager
def children_end_with_this() -> Iterator[None]:
    """While it lasts, processes of kd that this thread starts will end when this process does."""
    before = os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARENT]
        else:
            os.environ[PARENT] = before


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal_on_parents_death() -> bool:
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0


def _watch(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    except (OSError, AttributeError):  # an old kernel, or none of Linux
        _poll(pid)
    else:
        ended = select.poll()  # select() takes no descriptor above 1023
        ended.register(descriptor, select.POLLIN)
        ended.poll()
    _end()


def _poll(pid: int) -> None:
    is_parent = os.getppid() == pid
    while os.getppid() == pid if is_parent else _exists(pid):
        time.sleep(POLL_S)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
