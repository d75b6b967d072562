"""Small copies of images."""

from __future__ import annotations

import base64
import io

from PIL import Image

PNG_URI = "data:image/png;base64,"


def thumbnail(image: Image.Image, longest_px: int) -> Image.Image:
    """A copy in RGB (or RGBA) whose longest side is at most `longest_px`; never enlarged."""
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((longest_px, longest_px))
    return small


def png_data_uri(image: Image.Image) -> str:
    """The image as a PNG in a `data:` URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return PNG_URI + base64.b64encode(buffer.getvalue()).decode("ascii")
