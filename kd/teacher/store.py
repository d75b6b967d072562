"""Rows of bytes in a folder, found by their keys, for many writers and readers at once.

A writer keeps its rows in memory and publishes them as one more segment, a safetensors file with
a unique name: `keys` [R, 16], `offsets` [R + 1] into `data`, and `crc` [R] of key and row. Nothing
is ever changed in place: a kill loses what was not published, and nothing else.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kd.files import TEMPORARY, write_atomic
from kd.types import UserError

SEGMENT_BYTES = 64 * 2**20
"""Published when so much is waiting, …"""
PUBLISH_S = 60.0
"""… or the oldest row has waited so long."""
STALE_S = 24 * 3600.0
"""Age of the leavings of a writer that was killed while publishing."""
KEY_BYTES = 16


class Segment:
    """A published file. Rows are read from the disk when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = safe_open(path, framework="np")
            keys, offsets, crc = (file.get_tensor(name) for name in ("keys", "offsets", "crc"))
            self._data = file.get_slice("data")
            (size,) = self._data.get_shape()
        except (SafetensorError, ValueError) as error:
            raise self._damaged(str(error)) from None
        whole = keys.shape == (len(crc), KEY_BYTES) and offsets.shape == (len(crc) + 1,)
        if not whole or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise self._damaged("its parts do not fit")
        self._crc, self._offsets = crc, offsets.tolist()
        flat = keys.tobytes()
        self.keys = [flat[i : i + KEY_BYTES] for i in range(0, len(flat), KEY_BYTES)]

    def row(self, i: int) -> np.ndarray:
        """The bytes of a row. Raises UserError where they are not those that were written."""
        data = self._data[self._offsets[i] : self._offsets[i + 1]]
        if _crc(self.keys[i], data) != self._crc[i]:
            raise self._damaged(f"row {i} has changed")
        return data

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is damaged ({what})\nRemove this file: its rows are filled again"
        )


def _crc(key: bytes, data: np.ndarray) -> int:
    return zlib.crc32(data, zlib.crc32(key))


class Store:
    """The rows of a folder. Opening and reading raise UserError at a damaged file."""

    def __init__(self, folder: Path, *, ignored: frozenset[Path] = frozenset()) -> None:
        self.folder, self._ignored = folder, ignored
        self._segments: dict[Path, Segment] = {}
        self._index: dict[bytes, tuple[Segment, int]] = {}
        self._waiting: dict[bytes, np.ndarray] = {}
        self._waiting_bytes, self._since = 0, 0.0
        self.refresh()

    def __len__(self) -> int:
        return len(self._index) + len(self._waiting)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index or key in self._waiting

    def get(self, key: bytes) -> np.ndarray | None:
        """The bytes of a row, uint8 [n]; None: it is not there."""
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._index:
            return None
        segment, i = self._index[key]
        return segment.row(i)

    def put(self, key: bytes, data: np.ndarray) -> None:
        """Keep a row, uint8 [n], unless there is one; on the disk with the next `publish`."""
        if key in self:
            return
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[key] = data
        self._waiting_bytes += data.size

    def refresh(self) -> None:
        """Find what others have published since."""
        for path in segment_paths(self.folder):
            if path not in self._segments and path not in self._ignored:
                self._add(Segment(path))

    def _add(self, segment: Segment) -> None:
        self._segments[segment.path] = segment
        for i, key in enumerate(segment.keys):
            self._index.setdefault(key, (segment, i))

    @property
    def is_due(self) -> bool:
        """Whether it is time to publish."""
        waited_s = time.monotonic() - self._since if self._waiting else 0.0
        return self._waiting_bytes >= SEGMENT_BYTES or waited_s >= PUBLISH_S

    def publish(self) -> None:
        """Put all rows that wait on the disk for good. Raises OSError where it refuses."""
        if not self._waiting:
            return
        rows = list(self._waiting.values())
        keys, lengths = b"".join(self._waiting), [len(row) for row in rows]
        crc = [_crc(key, row) for key, row in self._waiting.items()]
        body = save(
            {
                "keys": np.frombuffer(keys, dtype=np.uint8).reshape(-1, KEY_BYTES),
                "offsets": np.cumsum([0, *lengths], dtype=np.int64),
                "crc": np.array(crc, dtype=np.uint32),
                "data": np.concatenate(rows),
            }
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_atomic(path, body)
        self._waiting.clear()
        self._waiting_bytes = 0
        self._add(Segment(path))
        remove_leavings(self.folder)


def segment_paths(folder: Path) -> list[Path]:
    """The published files, in the order of their names; no folder is an empty one."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name[0] != ".")


def remove_leavings(folder: Path) -> None:
    """Remove what writers that were killed long ago have left behind."""
    for path in folder.glob(f".*{TEMPORARY}"):
        try:
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
        except OSError:  # its writer is alive, or of another user
            continue


def damage(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Read every row of these segments; the damaged files, each with what is wrong with it."""
    for path in paths:
        try:
            segment = Segment(path)
            for i in range(len(segment.keys)):
                segment.row(i)
        except UserError as error:
            yield path, str(error)
