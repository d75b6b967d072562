"""Commands in processes of their own, which end with the test that has started them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import IO, Any

import psutil

from kd.process import PARENT

LIMIT_S = 600.0
"""How long an event is waited for: also where other work has the cores. Tests time out later."""
MARK = "KD_TEST_PROCESS"


def environment(**more: str) -> dict[str, str]:
    """Of a command line in a test. Processes of kd end with this one, and show where they hang."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **settings, PARENT: str(os.getpid()), **more}


def wait_for(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
    """Until it holds."""
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends, f"not within {limit_s:.0f} s"
        time.sleep(0.01)


def join(*waited_for: threading.Thread | BaseProcess) -> None:
    """Until they have ended."""
    for one in waited_for:
        one.join(LIMIT_S)
        assert not one.is_alive(), f"{one.name} not ended within {LIMIT_S:.0f} s"


class Process:
    """A command whose output goes to files: who reads pipes waits for all that hold them."""

    def __init__(
        self,
        *command: Any,
        env: dict[str, str] | None = None,
        one_output: bool = False,
        **options: Any,
    ) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115
        self._err = self._out if one_output else tempfile.TemporaryFile()  # noqa: SIM115
        self.mark = uuid.uuid4().hex
        self.popen = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env={**(env or environment()), MARK: self.mark},
            **options,
        )
        RUNNING.append(self)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def returncode(self) -> int | None:
        return self.popen.poll()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _content(self._out)

    @property
    def stderr(self) -> str:
        return _content(self._err)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Its exit code. Others that it has started may be there still."""
        try:
            return self.popen.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.tail()}\nnot ended within {limit_s:.0f} s") from None

    def wait_for(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Until it holds; fails where the process ends before."""

        def holds() -> bool:
            if condition():
                return True
            assert self.returncode is None, self.tail()
            return False

        wait_for(holds, limit_s)

    def members(self) -> list[psutil.Process]:
        """The process and all that have come from it, whoever their parents are now."""
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            is_dead = process.status() == psutil.STATUS_ZOMBIE
            return not is_dead and process.environ().get(MARK) == self.mark
        except psutil.Error:  # it has just ended, or is another user's
            return False

    def end(self) -> None:
        """Kill it and all that have come from it."""
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait(30)
        if self in RUNNING:
            RUNNING.remove(self)

    def tail(self) -> str:
        """The end of what it has printed, for people."""
        text = self.stdout if self._out is self._err else f"{self.stdout}\n{self.stderr}"
        return f"{self.popen.args} ({self.pid}, exit code {self.returncode}):\n{text[-4000:]}"


RUNNING: list[Process] = []
"""Not ended yet."""


def _content(file: IO[bytes]) -> str:
    # Not by seek and read: the process goes on writing at the same place.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


@contextlib.contextmanager
def started(*command: Any, **options: Any) -> Iterator[Process]:
    """A process that is there as long as this lasts, see `Process`."""
    process = Process(*command, **options)
    try:
        yield process
    finally:
        process.end()


def completed(*command: Any, limit_s: float = LIMIT_S, **options: Any) -> Process:
    """A process that has ended by itself."""
    with started(*command, **options) as process:
        process.wait(limit_s)
    return process


def python(*arguments: Any) -> list[Any]:
    """The command of this interpreter."""
    return [sys.executable, *arguments]
