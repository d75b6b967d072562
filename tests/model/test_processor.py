"""Settings of image processors: they change an image's tokens, are saved, and fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from kd.data import Collator, Renderer
from kd.model import FrozenVLM, PretrainedModel, ProcessorConfig, check_images, same_rendering
from kd.types import Sample, UserError
from tests.model.families import FAMILIES, write

NOISE = np.random.RandomState(0).randint(0, 256, (48, 96, 3), dtype=np.uint8)
CONTENT = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
SAMPLE = Sample("a", [{"role": "user", "content": CONTENT}], [Image.fromarray(NOISE)], "A circle.")


def image_tokens(processor: ProcessorMixin) -> int:
    ids_S = Renderer(processor).prompt(SAMPLE).ids_S
    return int((ids_S == processor.image_token_id).sum())


def load(folder: Path, **settings: Any) -> ProcessorMixin:
    spec = PretrainedModel(name=str(folder), processor=ProcessorConfig(**settings))
    return spec.build_processor(list)


def small_edges(shortest: int, longest: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": shortest, "longest_edge": longest}}


# An image of 96 x 48 pixels: tokens with the family's own settings, and with those given.
CASES = [
    ("qwen3_vl", small_edges(1024, 2048), 6, 2),
    ("qwen2_5_vl", small_edges(784, 2048), 6, 2),
    ("qwen3_5_hybrid", {"max_pixels": 2048, "min_pixels": 1024}, 6, 2),
    ("glm4v", small_edges(1568, 2048), 6, 1),
    ("internvl", {"max_patches": 1}, 12, 4),
    ("idefics3", {"do_image_splitting": False}, 12, 4),
    ("idefics3", {"size": {"longest_edge": 128}}, 12, 36),
    ("smolvlm", {"do_image_splitting": False}, 12, 4),
    ("mistral3", {"size": {"longest_edge": 32}}, 8, 2),
    ("lfm2_vl", {"do_image_splitting": False}, 10, 2),
    ("lfm2_vl", {"use_thumbnail": False}, 10, 8),
]


@pytest.mark.parametrize(("family", "image", "own", "other"), CASES)
def test_settings_change_the_tokens_of_an_image(family, image, own, other, tmp_path):
    write(family, tmp_path)
    processor = load(tmp_path, image=image)
    assert (image_tokens(load(tmp_path)), image_tokens(processor)) == (own, other)
    assert not same_rendering(processor, load(tmp_path))
    # The model takes as many features as there are tokens, and what is saved makes as many.
    vlm = FrozenVLM(AutoModelForImageTextToText.from_pretrained(tmp_path))
    collator = Collator(Renderer(processor), None, 2048, lockstep=False)
    assert vlm.targets(collator([SAMPLE]).student).hidden_ND.isfinite().all()
    check_images(vlm, collator.prompts, torch.device("cpu"))
    processor.save_pretrained(tmp_path / "export")
    assert image_tokens(AutoProcessor.from_pretrained(tmp_path / "export")) == other


REFUSED = [
    ("lfm2_vl", {"max_tile": 4}, r"max_tile is no setting of its Lfm2VlImage.*, max_tiles, "),
    ("llava", {"return_tensors": "np"}, "return_tensors is no setting"),
    ("internvl", {"max_patches": "many"}, ".*: GotOcr2ImageProcessor refuses it .*expected int"),
    ("qwen3_vl", {"size": {"longest_edge": 64}}, ".* refuses it .*'shortest_edge' and 'longest"),
    ("gemma3", {"do_pan_and_scan": True}, "do_pan_and_scan would .*Gemma3Processor sets it to F"),
    ("internvl", {"crop_to_patches": False}, "crop_to_patches would change nothing"),
]


@pytest.mark.parametrize(("family", "image", "says"), REFUSED)
def test_what_is_no_setting_is_refused(family, image, says):
    with pytest.raises(UserError, match=f"the model: processor.image.{says}"):
        ProcessorConfig(image=image).apply(FAMILIES[family]()[1], "the model")


def test_pixel_bounds_of_a_processor_that_tiles_are_refused_with_what_it_has():
    with pytest.raises(UserError, match=r"has no pixel bounds: .*processor\.image .*max_tiles"):
        ProcessorConfig(max_pixels=4096).apply(FAMILIES["lfm2_vl"]()[1], "the model")


# Sizes that are in the weights: of a tile, of the vision tower's input, or of the grids.
@pytest.mark.parametrize(
    ("family", "image"),
    [
        ("idefics3", {"max_image_size": {"longest_edge": 64}}),
        ("internvl", {"size": {"height": 64, "width": 64}}),
        ("gemma3", {"size": {"height": 64, "width": 64}}),
        ("llava", {"crop_size": {"height": 64, "width": 64}}),
        ("llava_onevision", {"image_grid_pinpoints": [[32, 32]]}),
    ],
)
def test_images_that_the_model_cannot_read_are_refused(family, image, tmp_path):
    write(family, tmp_path)
    vlm = FrozenVLM(AutoModelForImageTextToText.from_pretrained(tmp_path))
    collator = Collator(Renderer(load(tmp_path, image=image)), None, 2048, lockstep=False)
    with pytest.raises(UserError, match="cannot read what its processor makes of an image"):
        check_images(vlm, collator.prompts, torch.device("cpu"))
