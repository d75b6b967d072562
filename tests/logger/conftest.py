from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb
from PIL import Image

from kd.logger import RolloutRecord, SampleRecord


@pytest.fixture
def record() -> Callable[..., SampleRecord]:
    """A validation sample with a 400x100 picture; fields can be replaced."""

    def make(**fields) -> SampleRecord:
        defaults = {
            "id": "row-1",
            "kind": "count",
            "question": "How many?",
            "answer": "three",
            "student": "four",
            "teacher": "three",
            "correct": False,
            "images": [Image.new("RGB", (400, 100), "red")],
        }
        return SampleRecord(**{**defaults, **fields})

    return make


@pytest.fixture
def rollout() -> Callable[..., RolloutRecord]:
    """A response of the student's to the same row, cut; fields can be replaced."""

    def make(**fields) -> RolloutRecord:
        defaults = {
            "id": "row-1",
            "kind": "count",
            "question": "How many?",
            "answer": "three",
            "policy": "student",
            "tokens": ["There", " are", "\n", " four"],
            "divergence": [0.5, 0.0, 0.25, 2.0],
            "finished": False,
            "staleness": 3,
            "images": [Image.new("RGB", (400, 100), "red")],
        }
        return RolloutRecord(**{**defaults, **fields})

    return make


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account and a server that is never there; wandb reads both once per session."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()
