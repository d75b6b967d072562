"""Processes that read rows: forked by a server, and gone when their run is."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from kd.process import children_end_with_this, end_with


def start_fork_server() -> ForkServerContext:
    """The context that workers are started in; its server starts now, and imports what they need.

    To be called first by the main thread: the server ends with the thread that has started it.
    """
    # Not fork: a copy of a process with threads (OpenMP, NCCL, a logger's) may hang on their locks.
    context = ForkServerContext()
    context.set_forkserver_preload(["kd.data"])
    with children_end_with_this():
        forkserver.ensure_running()
    return context


def end_with_run(_worker: int) -> None:
    """In a worker: end when the run does, however it dies.

    What torch itself does about it looks at the parent, and that is the fork server, which is kept
    alive by its workers: both would outlive the run.
    """
    end_with(os.getppid())  # the server, which ends with the run
    run = multiprocessing.parent_process()
    if run is not None and not run.is_alive():  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)
