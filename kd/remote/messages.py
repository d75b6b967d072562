"""A row's messages as chat servers read them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from kd.types import Sample


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The messages of `sample`, with its images in their places as data URIs."""
    images = iter(sample.images)
    return [
        {**message, "content": _content(message["content"], images)} for message in sample.messages
    ]


def _content(content: str | list[dict[str, Any]], images: Iterator[Image.Image]) -> Any:
    if isinstance(content, str):
        return content
    return [_image_part(next(images)) if part["type"] == "image" else part for part in content]


def _image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def data_uri(image: Image.Image) -> str:
    """The image as a PNG: no pixel is changed."""
    buffer = io.BytesIO()
    # As the processor converts it: the server would put what is transparent on white.
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
