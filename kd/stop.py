"""SIGUSR1 asks a run to stop: it saves a checkpoint after its step and ends with exit code 75.

A batch system that wants the machine back, or is about to end a job, sends it; the same command
goes on from there. What starts ranks passes it on to them. In a job of submitit its own signal
means the same, and submitit then queues the job again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

SIGNAL = signal.SIGUSR1
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again


class Stopped(SystemExit):
    """The run has saved a checkpoint and ends because it was asked to."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Whether this process has been asked to stop, since it listens."""

    def __init__(self) -> None:
        self.asked = False
        self._listens = False

    def listen(self) -> None:
        """Note the signal from now on, and one held back until now."""
        if not self._listens:
            self._listens = True
            on_signal(self._note)

    def _note(self) -> None:
        self.asked = True

    def __reduce__(self) -> str:
        return "stop_request"  # by name: a launcher's job must not be given one of its own


stop_request = StopRequest()
"""Of this process, as its signals are."""


_acts: list[Callable[[], None]] = []
_submitit: list[Callable[[int, FrameType | None], Any]] = []
"""What it does on its signal, while we listen in its place."""


def signals() -> set[int]:
    """Which signals ask to stop."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return {SIGNAL}
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")  # as submitit itself has it
    return {SIGNAL, getattr(signal, f"SIG{name}", SIGNAL)}


def requeue() -> None:
    """Leave the rest to submitit, where this process is a job of it: it ends by this."""
    for act in _submitit:
        act(SIGNAL, None)


def on_signal(act: Callable[[], None]) -> None:
    """Call `act` whenever the signal comes. From the main thread.

    A process started from here on has the signal held back for it until it calls this itself: it
    is neither killed by one that comes while it still imports, nor does it miss it.
    """
    _acts.append(act)
    if len(_acts) > 1:
        return
    for number in signals():
        before = signal.signal(number, _tell_all)  # for older threads, which do not block it
        if "SUBMITIT_EXECUTOR" in os.environ and callable(before):
            _submitit.append(before)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals())
    threading.Thread(target=_wait, name="stop", daemon=True).start()


def _wait() -> None:
    while True:
        signal.sigwait(signals())
        _tell_all()


def _tell_all(*_: object) -> None:
    for act in _acts:
        act()


@functools.cache  # once is enough
def pass_on_to_children() -> None:
    """Send the signal to all processes that this one has started by then, whenever it comes."""
    on_signal(_tell_children)


def _tell_children() -> None:
    for pid in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNAL)


def children(parent: int) -> list[int]:
    """The processes that process `parent` has started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            # "pid (name) state parent …", and the name may hold anything
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return [pid for pid, of in parents.items() if of == parent]
