"""A test that hangs ends its process, after all processes involved have shown where they are.

pytest-timeout would fail the test and go on to fixtures that may wait for the same thing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from typing import Any

import psutil
import pytest
import pytest_timeout

from kd.process import PARENT
from tests.processes import RUNNING

SHOWN_S = 3.0
"""For processes to write their stacks."""
LOCKED_S = 60.0
"""Later this process is ended all the same: a thread that holds the interpreter's lock hangs."""
EXIT_LIMIT_S = 120
terminal = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[terminal] = os.dup(2)  # before output is captured
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist end with this process
        os.environ[PARENT] = str(os.getpid())
    os.environ["PYTHONFAULTHANDLER"] = "1"  # data workers, and what tests start


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker waits for the others
        # Threads or children that the interpreter waits for.
        faulthandler.dump_traceback_later(EXIT_LIMIT_S, exit=True, file=config.stash[terminal])


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """In place of pytest-timeout's own."""
    timer = threading.Timer(settings.timeout, end, (item, settings.timeout))
    timer.daemon = True
    timer.start()
    stderr = item.config.stash[terminal]
    faulthandler.dump_traceback_later(settings.timeout + LOCKED_S, exit=True, file=stderr)
    item.cancel_timeout = timer.cancel  # type: ignore[attr-defined]
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    faulthandler.cancel_dump_traceback_later()
    if hasattr(item, "cancel_timeout"):
        item.cancel_timeout()
    return True


def end(item: pytest.Item, limit_s: float) -> None:
    """Show the stacks of this process and of all that it has started, and exit."""
    if pytest_timeout.is_debugging():
        return
    stderr = item.config.stash[terminal]

    def say(text: str) -> None:
        os.write(stderr, f"{text}\n".encode())

    say(f"\n{'=' * 20} {item.nodeid} has not ended within {limit_s:.0f} s {'=' * 20}")
    faulthandler.dump_traceback(stderr)
    others = {process.pid for running in RUNNING for process in running.members()}
    others |= {child.pid for child in psutil.Process().children(recursive=True)}
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)  # PYTHONFAULTHANDLER: prints the stacks of its threads
    time.sleep(SHOWN_S)
    for running in RUNNING:
        say(f"{'-' * 20} {running.tail()}")
        running.end()
    capture = item.config.pluginmanager.getplugin("capturemanager")
    capture.suspend_global_capture(in_=True)
    for text in capture.read_global_capture():
        say(f"{'-' * 20} captured:\n{text[-8000:]}")
    os._exit(1)
