"""The body of a request -> rows that are safe to be read by the model, or Refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from kd.data import Prompt, Renderer, RowError
from kd.data.collate import RenderedSample
from kd.data.images import data_uri_bytes, decode_image
from kd.data.messages import Parsed, parse_conversation
from kd.serve.config import ServeConfig
from kd.serve.model import Row, ServedModel, TopKOf
from kd.serve.schema import Refused, RowBody, TargetsBody, TopKBody, read_targets
from kd.types import Rollout

# Decoders that run no other program and take no reference to a file.
FORMATS = ("PNG", "JPEG", "WEBP")


class Reader:
    """Parses, checks and renders requests; for several threads."""

    def __init__(self, model: ServedModel, limits: ServeConfig) -> None:
        self.model, self.limits = model, limits
        self._own = threading.local()

    def __call__(self, body: bytes | bytearray) -> list[Row]:
        """The rows of a request. Raises Refused."""
        request = read_targets(body)
        self._check_size(request)
        top = self._top(request)
        pixels = _Pixels(self.limits)
        rows = []
        for number, row in enumerate(request.rows):
            try:
                rows.append(self._row(row, top, pixels))
            except RowError as error:
                raise Refused(422, f"row {number}: {error}") from None
            except Refused as refused:
                raise Refused(refused.status, f"row {number}: {refused.message}") from None
        return rows

    def _check_size(self, request: TargetsBody) -> None:
        if len(request.rows) > self.limits.max_rows:
            raise Refused(
                413,
                f"{len(request.rows)} rows, at most {self.limits.max_rows} in one request "
                "(serve.max_rows)",
            )

    def _top(self, request: TargetsBody) -> TopKOf | None:
        if not isinstance(request, TopKBody):
            return None
        info = self.model.info
        if request.vocab > info.vocab_size:
            raise Refused(422, f"vocab: {request.vocab}, the teacher has {info.vocab_size} entries")
        if request.k > info.max_top_k:
            raise Refused(422, f"k: {request.k}, at most {info.max_top_k} (serve.max_top_k)")
        if request.k >= request.vocab:
            raise Refused(422, f"k: {request.k}, must be below the vocab of {request.vocab}")
        return TopKOf(request.k, request.temperature, request.vocab)

    def _row(self, row: RowBody, top: TopKOf | None, pixels: _Pixels) -> Row:
        ids = row.response_ids
        self._check_response(ids, self.model.info.vocab_size if top is None else top.vocab)
        parsed = parse_conversation(row.messages, None, require_answer=False)
        if parsed.answer is not None:
            raise RowError("it ends in an assistant turn; the response belongs in response_ids")
        prompt, sample = self._render(parsed, pixels.images(parsed.images))
        prompt_ids = prompt.ids_S.tolist()
        if len(prompt_ids) + len(ids) > self.model.info.max_length:
            raise Refused(
                413,
                f"{len(prompt_ids)} + {len(ids)} tokens of prompt and response, at most "
                f"{self.model.info.max_length} (serve.max_length)",
            )
        return Row(Rollout(sample, ids, True, 0), prompt_ids, top)

    def _check_response(self, ids: list[int], vocab: int) -> None:
        if ids and max(ids) >= vocab:
            raise RowError(f"response_ids has {max(ids)}, beyond the {vocab} tokens")
        media = self.model.media_ids.intersection(ids)
        if media:
            raise RowError(f"response_ids has {min(media)}, which stands for an image")

    def _render(self, parsed: Parsed, images: list[Image.Image]) -> tuple[Prompt, RenderedSample]:
        sample = RenderedSample("request", parsed.messages, images, None)
        try:
            prompt = self._renderer().prompt(sample)
        except RowError:
            raise
        # Chat templates and processors are code of the model's, and meet whatever a client sends.
        except Exception as error:
            said = str(error).strip().split("\n")[0] or type(error).__name__
            raise RowError(f"the teacher's processor refuses it: {said}") from error
        sample.prompts = [prompt]
        return prompt, sample

    def _renderer(self) -> Renderer:
        # One per thread: a tokenizer keeps settings of the call under way.
        if not hasattr(self._own, "renderer"):
            processor: ProcessorMixin = copy.deepcopy(self.model.processor)
            self._own.renderer = Renderer(processor, self.model.chat_template_kwargs)
        return self._own.renderer


class _Pixels:
    """Decodes the images of one request within its limits."""

    def __init__(self, limits: ServeConfig) -> None:
        self.limits = limits
        self._images, self._pixels = 0, 0

    def images(self, references: list[Any]) -> list[Image.Image]:
        """Raises RowError for anything but an image in a data URI, Refused for too many."""
        return [self._image(reference, number) for number, reference in enumerate(references)]

    def _image(self, reference: Any, number: int) -> Image.Image:
        name = f"image {number}"
        if not isinstance(reference, str) or not reference.startswith("data:"):
            raise RowError(f"{name} is no data URI (data:image/png;base64,…)")
        self._images += 1
        if self._images > self.limits.max_images:
            raise Refused(
                413, f"more than {self.limits.max_images} images in a request (serve.max_images)"
            )
        limit = self.limits.max_image_pixels
        image = decode_image(
            data_uri_bytes(reference), name, limit, "serve.max_image_pixels", FORMATS
        )
        self._pixels += image.width * image.height
        if self._pixels > self.limits.max_request_pixels:
            raise Refused(
                413,
                f"images of more than {self.limits.max_request_pixels} pixels in a request "
                "(serve.max_request_pixels)",
            )
        return image
