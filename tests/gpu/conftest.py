"""The rows of scripts/gpu_check.sh.

A row that takes `device` runs on a CPU as well, in the default test run and at a small size, so
that its code is known to work; with CUDA it has the marker `gpu` and the sizes of docs/gpu.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """`cpu` or `cuda`."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param


@pytest.fixture
def cuda() -> str:
    """For rows of a GPU alone."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture
def found() -> Callable[[str, Any], None]:
    """Records what a row has found, for the report."""

    def record(name: str, value: Any) -> None:
        line = json.dumps([name, value])
        print(line, flush=True)
        if path := os.environ.get("KD_GPU_FOUND"):
            with open(path, "a") as file:
                file.write(line + "\n")

    return record
