"""A hang ends the test run within its time-out, and shows where every process involved was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.processes import environment, python, started

CONFTEST = """
import tests.hangs
pytest_plugins = ["tests.hangs"]
tests.hangs.SHOWN_S, tests.hangs.LOCKED_S = 1.0, 3.0
"""
HANGS = {
    "a test": """
def test_it(child):
    hangs_here()
""",
    "a fixture": """
@pytest.fixture
def slow():
    yield
    hangs_here()

def test_it(child, slow): ...
""",
    "the interpreter's lock": """
def hangs_here():
    ctypes.PyDLL(None).sleep(600)

def test_it():
    hangs_here()
""",
}
COMMON = """
import ctypes, subprocess, sys, time
import pytest
from tests.processes import python, started

CHILD = "def child_hangs_here():\\n    while True: pass\\nchild_hangs_here()"

@pytest.fixture
def child():
    with started(*python("-c", CHILD)) as process:
        yield process

def hangs_here():
    print("printed before")
    time.sleep(600)
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", HANGS)
def test_a_hang_shows_all_stacks_and_ends(tmp_path, repo: Path, where, workers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_hang.py").write_text(COMMON + HANGS[where])
    command = python("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path)
    command += ["--timeout=4", "-n", workers]
    env = environment(PYTHONPATH=str(repo))
    began = time.monotonic()
    with started(*command, env=env, one_output=True, cwd=tmp_path) as process:
        assert process.wait() != 0
        lasted_s = time.monotonic() - began
        left = process.members()
    assert not left
    assert "in hangs_here" in process.stdout, process.stdout
    if where != "the interpreter's lock":
        assert "test_it has not ended within 4 s" in process.stdout
        assert "in child_hangs_here" in process.stdout, process.stdout
    if where == "a test":
        assert "printed before" in process.stdout
    assert lasted_s < 300, process.stdout  # the child and the sleeps would last for ever
