"""Image references in a user's rows -> RGB images. What goes wrong is a RowError."""

from __future__ import annotations

import base64
import binascii
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from kd.data.base import RowError

HTTP_ATTEMPTS = 3
READ_BYTES = 1 << 16


@dataclass
class ImageLoader:
    """Loads images from bytes, paths (relative to `root`) and URLs, within limits."""

    root: Path
    allow_http: bool
    max_pixels: int
    max_bytes: int
    timeout_s: float

    def load(self, ref: Any) -> Image.Image:
        """The image as RGB, turned as its EXIF orientation says.

        `ref`: bytes; a path; a file:, data: or http(s): URL; or a mapping with one of `bytes` (raw,
        or base64 text), `path` and `url`. Raises RowError where it cannot be had.
        """
        if isinstance(ref, bytes):
            return self._decode(ref, "image bytes")
        if isinstance(ref, dict):
            return self._load_mapping(ref)
        if not isinstance(ref, str) or not ref:
            raise RowError(f"an image is given as {type(ref).__name__}, not as bytes, path or URL")
        name = f"image {ref[:80]}"
        scheme = ref.partition(":")[0].lower() if ":" in ref[:6] else ""
        if scheme == "data":
            return self._decode(data_uri_bytes(ref), name[:40])
        if scheme in ("http", "https"):
            return self._decode(self._fetch(ref), name)
        if scheme == "file":
            ref = urllib.request.url2pathname(urllib.parse.urlsplit(ref).path)
        return self._decode(self._read(self.root / ref), name)

    def _load_mapping(self, ref: dict[str, Any]) -> Image.Image:
        raw = ref.get("bytes")
        if isinstance(raw, bytes):
            return self._decode(raw, "image bytes")
        if isinstance(raw, str):
            return self._decode(_base64(raw), "image bytes")
        for key in ("path", "url"):
            if ref.get(key):
                return self.load(ref[key])
        raise RowError(f"an image has none of bytes, path and url, only {sorted(ref)}")

    def _read(self, path: Path) -> bytes:
        try:
            size = path.stat().st_size
            if size > self.max_bytes:
                raise RowError(f"image {path} has {size} bytes, more than {self.max_bytes}")
            return path.read_bytes()
        except OSError as error:
            raise RowError(f"image {path} cannot be read: {error.strerror}") from error

    def _fetch(self, url: str) -> bytes:
        if not self.allow_http:
            raise RowError(f"image {url} is on the web; set data.allow_http=true to fetch such")
        for attempt in range(HTTP_ATTEMPTS):
            try:
                return self._download(url)
            except (OSError, HTTPException) as error:
                final = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if final or attempt == HTTP_ATTEMPTS - 1:
                    raise RowError(f"image {url} cannot be fetched: {error}") from error
                time.sleep(2**attempt)
        raise AssertionError

    def _download(self, url: str) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        body = bytearray()
        request = urllib.request.Request(url, headers={"User-Agent": "kd-vlm"})
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            # The time-out of a socket is per read: a server that drips would never meet it.
            while piece := response.read1(READ_BYTES):
                body += piece
                if len(body) > self.max_bytes:
                    raise RowError(f"image {url} has more than {self.max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not there after {self.timeout_s} s")
        return bytes(body)

    def _decode(self, raw: bytes, name: str) -> Image.Image:
        if len(raw) > self.max_bytes:
            raise RowError(f"{name}: {len(raw)} bytes, more than {self.max_bytes}")
        return decode_image(raw, name, self.max_pixels, "data.max_image_pixels")


def decode_image(
    raw: bytes, name: str, max_pixels: int, limit: str, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says.

    `limit` is what sets `max_pixels`; `formats` None: all that PIL knows. Raises RowError.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=formats) as image:
            # `open` reads the header only: a decompression bomb is refused unopened.
            if image.width * image.height > max_pixels:
                raise RowError(
                    f"{name}: {image.width}x{image.height} pixels, more than {limit} {max_pixels}"
                )
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                raise RowError(f"{name}: pixel mode {image.mode}; convert it to 8 bits first")
            return ImageOps.exif_transpose(image).convert("RGB")
    except RowError:
        raise
    except UnidentifiedImageError as error:
        known = "" if formats is None else f" of the formats {', '.join(formats)}"
        raise RowError(f"{name} cannot be decoded: it is no image{known}") from error
    # Decoders raise almost anything on bad data: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise RowError(f"{name} cannot be decoded: {error}") from error


def data_uri_bytes(uri: str) -> bytes:
    """What a data URI holds. Raises RowError."""
    header, comma, body = uri.partition(",")
    if not comma:
        raise RowError(f"data URI without data: {uri[:40]}")
    return _base64(body) if header.endswith(";base64") else urllib.parse.unquote_to_bytes(body)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RowError(f"image bytes are not base64: {error}") from error
