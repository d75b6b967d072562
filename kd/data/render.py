"""One model's rendering of a row. Legend: S sequence.

A sequence is always prompt ids + response ids: the prompt rendered by the model's processor with
its images, the response from the tokenizer or the sampler. Masks follow from the boundary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from kd.data.base import RowError
from kd.types import Sample, UserError


@dataclass
class Prompt:
    """A rendered prompt, up to and including the opening of the assistant's turn."""

    ids_S: Tensor
    aligned_S: dict[str, Tensor]
    """One value per token, such as mm_token_type_ids."""
    media: dict[str, Tensor]
    """Joined over rows on dimension 0, such as pixel_values and image_grid_thw; where the other
    dimensions differ (the largest image, the most tiles) they are padded at their end."""

    def __getstate__(self) -> tuple:
        # As arrays: each tensor that a worker process sends holds a file descriptor open.
        aligned, media = (
            {k: x.numpy() for k, x in d.items()} for d in (self.aligned_S, self.media)
        )
        return self.ids_S.numpy(), aligned, media

    def __setstate__(self, state: tuple) -> None:
        ids, *rest = state
        self.ids_S = torch.from_numpy(ids)
        self.aligned_S, self.media = ({k: torch.from_numpy(x) for k, x in d.items()} for d in rest)


class Renderer:
    """Renders prompts by `processor`, its chat template given `chat_template_kwargs`."""

    def __init__(
        self, processor: ProcessorMixin, chat_template_kwargs: dict[str, Any] | None = None
    ):
        self.processor = processor
        self.chat_template_kwargs = chat_template_kwargs or {}
        tokenizer = processor.tokenizer
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        assert eos is not None, "the tokenizer has no EOS"
        self.eos_token_id: int = eos
        self.pad_token_id: int = eos if pad is None else pad
        self._control = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))

    def prompt(self, sample: Sample) -> Prompt:
        """The prompt of `sample`, image placeholders expanded.

        Raises RowError where the row's text holds a control token, or the processor refuses an
        image (too thin, say).
        """
        self._refuse_control_tokens(sample)
        text = self._text(sample)
        try:
            # The template has written its own special tokens; the tokenizer must not add a BOS.
            out = self.processor(
                text=[text],
                # A list per row: some processors treat the images of one row otherwise than many.
                images=[sample.images] if sample.images else None,
                add_special_tokens=False,  # pyright: ignore[reportCallIssue]
                return_tensors="pt",  # pyright: ignore[reportCallIssue]
            )
        except ValueError as error:
            raise RowError(f"the processor refuses it: {error}") from error
        return _split(dict(out), self.processor.image_processor.model_input_names)

    def image_tokens(self, sample: Sample, prompt: Prompt) -> int:
        """How many tokens of its prompt are there for the images, marks of rows and tiles too."""
        ids = self.processor.tokenizer(self._text(sample), add_special_tokens=False)["input_ids"]
        return len(prompt.ids_S) - len(ids) + len(sample.images)

    def response(self, answer: str) -> list[int]:
        """Ids of `answer` and EOS. Raises RowError where it holds a control token."""
        self._check_text(answer, "the answer")
        ids = self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.eos_token_id]

    def _text(self, sample: Sample) -> str:
        return self.processor.apply_chat_template(
            sample.messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )

    def _refuse_control_tokens(self, sample: Sample) -> None:
        for number, message in enumerate(sample.messages):
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            for part in parts:
                self._check_text(part.get("text", ""), f"turn {number}")

    def _check_text(self, text: str, where: str) -> None:
        # Left alone it would become the token itself: a turn's end, or an image that is not there.
        found = self._control.search(text)
        if found:
            raise RowError(f"{where} contains the control token '{found.group()}'")


def _split(out: dict[str, Tensor], of_images: list[str]) -> Prompt:
    """Sort the processor's output: what is [1, S] and not of an image is aligned to the tokens."""
    ids_1S = out.pop("input_ids")
    out.pop("attention_mask")
    # An image's patches can be as many as the tokens: the shape alone does not tell.
    aligned = {
        name: x[0] for name, x in out.items() if x.shape == ids_1S.shape and name not in of_images
    }
    media = {name: x for name, x in out.items() if name not in aligned}
    for name, x in media.items():
        if name not in of_images and x.shape[:2] == ids_1S.shape:
            raise UserError(
                f"the processor gives {name} of shape {list(x.shape)}, token by token and image by "
                "image: a model that attends to its images apart from the tokens is not supported"
            )
    return Prompt(ids_1S[0].to(torch.int64), aligned, media)
