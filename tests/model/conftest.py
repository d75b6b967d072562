"""The families, and rows with two images, none and one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from kd.data import Collator, Renderer
from kd.model import FrozenVLM
from kd.parallel import ParallelConfig, World
from kd.types import Sample
from tests.model.families import FAMILIES, write

# Of the vision tower, what comes after the layer whose output is an image's features.
UNREAD = {
    "llava": ("encoder.layers.1.", "post_layernorm."),
    "llava_onevision": ("post_layernorm.",),
}


@dataclass
class Family:
    name: str
    folder: Path
    teacher_folder: Path
    processor: ProcessorMixin

    def model(self, dtype: str = "float32") -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype)

    def teacher(self) -> FrozenVLM:
        return FrozenVLM(AutoModelForImageTextToText.from_pretrained(self.teacher_folder))

    def collator(self, lockstep: bool = False) -> Collator:
        return Collator(Renderer(self.processor), None, 2048, lockstep)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    if request.param == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("its processor needs num2words")
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder / "student", seed=0)
    write(request.param, folder / "teacher", seed=1)
    processor = AutoProcessor.from_pretrained(folder / "student")
    return Family(request.param, folder / "student", folder / "teacher", processor)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    made = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield made
    made.close()
    torch.set_num_threads(threads)


def image(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def row(name: str, answer: str, *images: Image.Image) -> Sample:
    parts = [{"type": "image"} for _ in images]
    content = [*parts, {"type": "text", "text": "What is in the picture? " * (1 + len(answer) % 3)}]
    return Sample(name, [{"role": "user", "content": content}], list(images), answer)


TWO = row("two", "No.", image(32, 32, 1), image(48, 64, 2))
NONE = row("none", "A red square, that is all there is.")
ONE = row("one", "A blue circle.", image(64, 32, 0))
ROWS = [TWO, NONE, ONE]
