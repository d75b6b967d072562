"""Machines that lack something: what a run needs is said in one or two lines."""

from __future__ import annotations

import shutil

import pytest

from tests.processes import completed, python

NO_NETWORK = ("unshare", "--user", "--map-root-user", "--net")


def test_without_a_network_interface(tmp_path):
    """As `unshare` makes it, where it may: not even the loopback interface is up."""
    if shutil.which("unshare") is None or completed(*NO_NETWORK, "true").returncode:
        pytest.skip("needs user namespaces")
    options = ["student=digits_small", f"run.dir={tmp_path}", "logger=jsonl", "doctor=never"]
    command = python("-m", "kd.run", "--config-name", "digits_teacher", *options)
    done = completed(*NO_NETWORK, *command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ranks talk over a network interface")
    assert done.stderr.endswith("Bring it up: ip link set lo up\n")
