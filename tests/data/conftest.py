from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import Qwen3VLProcessor

from kd.data.digits import all_texts
from kd.model.tiny import build_processor


@pytest.fixture(scope="session")
def processor() -> Qwen3VLProcessor:
    return build_processor(all_texts())


@pytest.fixture(scope="session")
def sharp_processor() -> Qwen3VLProcessor:
    """Same tokenizer, but every image is enlarged to at least 128x128: 4 times the tokens."""
    return build_processor(all_texts(), min_pixels=128 * 128)


@pytest.fixture
def png(tmp_path: Path) -> Callable[..., Path]:
    """Write a PNG of one colour into the test's folder."""

    def write(name: str, color: str = "red", size: tuple[int, int] = (64, 64)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        return path

    return write
