"""Files that are whole or absent, also for those who write and read them at the same time."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

TEMPORARY = ".tmp"
"""What the names of files end in that are not whole yet; they begin with a dot."""


def write_atomic(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Write the file as a whole or not at all, and on the disk for good.

    Raises FileExistsError where it is there already and `replace` is False, and OSError where the
    disk refuses; neither leaves anything behind.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
