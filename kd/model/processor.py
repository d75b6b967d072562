"""How one model's processor sees an image: its own settings, and those of the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from transformers import ProcessorMixin
from transformers.processing_utils import ImagesKwargs

from kd.model.vlm import VLM
from kd.types import Inputs, Sample, UserError

PROBE_PX = (640, 480)


@dataclass
class ProcessorConfig:
    """How one model renders a prompt and its images."""

    name: str | None = None
    """Folder or hub name; None: the model's own."""
    revision: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Bounds on the pixels of an image after resizing; None: the processor's own."""
    image: dict[str, Any] = field(default_factory=dict)
    """Settings of its image processor in place of its own, e.g. {do_image_splitting: false},
    {max_tiles: 4}, {size: {longest_edge: 512}}."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""

    def validate(self, key: str) -> None:
        """Refuse pixel bounds that no image can meet."""
        low, high = 1 if self.min_pixels is None else self.min_pixels, self.max_pixels
        if low < 1 or (high is not None and high < low):
            raise UserError(
                f"{key}.processor: min_pixels={self.min_pixels}, max_pixels={high}: "
                "give 1 <= min_pixels <= max_pixels"
            )

    def apply(self, processor: ProcessorMixin, model: str) -> ProcessorMixin:
        """The processor of `model`, a name for people, with the settings of this config.

        Raises UserError where its image processor does not have one, or refuses its value.
        """
        if self.image:
            _set(processor, self.image, model)
        if self.min_pixels is not None or self.max_pixels is not None:
            self._bound_pixels(processor, model)
        return processor

    def _bound_pixels(self, processor: ProcessorMixin, model: str) -> None:
        size = dict(processor.image_processor.size)
        if "shortest_edge" not in size or "longest_edge" not in size:
            raise UserError(
                f"{model}: {type(processor.image_processor).__name__} has no pixel bounds: in "
                "place of processor.min_pixels and max_pixels give processor.image some of its "
                f"settings, which are {', '.join(_settings(processor))}"
            )
        if self.min_pixels is not None:
            size["shortest_edge"] = self.min_pixels
        if self.max_pixels is not None:
            size["longest_edge"] = self.max_pixels
        if size["shortest_edge"] > size["longest_edge"]:
            raise UserError(
                f"{model}: {size['shortest_edge']} pixels at least and {size['longest_edge']} at "
                "most: set both processor.min_pixels and processor.max_pixels"
            )
        processor.image_processor.size = size


def check_images(vlm: VLM, prompts: Callable[[list[Sample]], Inputs], device: torch.device) -> None:
    """One forward, to see that the model can read what its processor makes of an image.

    How large an image or a tile may be is in the weights of some families. Raises UserError.
    Collective.
    """
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    image = Image.new("RGB", PROBE_PX)
    sample = Sample("probe", [{"role": "user", "content": content}], [image], None)
    try:
        vlm.generate(prompts([sample]).to(device), 1, [0], [])
    except torch.OutOfMemoryError:  # a RuntimeError, and nothing of the settings
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{type(vlm.model).__name__} cannot read what its processor makes of an image with "
            f"these settings in processor.image ({_in_one_line(error)})\nWhere the sizes of "
            "images and tiles are fixed by the weights, only their number can be set"
        ) from error


def _set(processor: ProcessorMixin, settings: dict[str, Any], model: str) -> None:
    own = processor.image_processor
    kind, known, fixed = type(own).__name__, _settings(processor), _fixed(processor)
    for name in settings:
        if name in fixed:
            raise UserError(
                f"{model}: processor.image.{name} would change nothing: "
                f"{type(processor).__name__} sets it to {fixed[name]} at every call"
            )
        if name not in known:
            raise UserError(
                f"{model}: processor.image.{name} is no setting of its {kind}, which are "
                f"{', '.join(known)}"
            )
    try:
        validate_typed_dict(own.valid_kwargs, settings)
        made = type(own).from_dict({**own.to_dict(), **settings})
        made([Image.new("RGB", PROBE_PX)], return_tensors="pt")
    except Exception as error:  # of many kinds, and most values are looked at only when used
        raise UserError(
            f"{model}: processor.image={settings}: {kind} refuses it ({_in_one_line(error)})"
        ) from error
    processor.image_processor = made


def _settings(processor: ProcessorMixin) -> list[str]:
    """Those that its kind of image processor adds, and of the common ones those that it uses."""
    own = processor.image_processor
    common = ImagesKwargs.__annotations__.keys() - own.to_dict().keys()
    return sorted(own.valid_kwargs.__annotations__.keys() - common - _fixed(processor).keys())


def _fixed(processor: ProcessorMixin) -> dict[str, Any]:
    """What the processor hands to its image processor at every call, over that one's settings."""
    return processor._merge_kwargs(processor.valid_processor_kwargs)["images_kwargs"]


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
