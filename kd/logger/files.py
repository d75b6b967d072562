"""Line-wise JSON files that survive a kill, and atomic writes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path`; a reader sees the old content or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append one line per record. Raises OSError naming the file, say when the disk is full."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def iter_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, record) of every whole line; nothing for a file that does not exist.

    A last line without its end is what a kill left of a write and is passed over; any other
    broken line is named in a warning.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _parse(line)
            if record is not None:
                yield line.rstrip(b"\n") + b"\n", record
            elif line.endswith(b"\n"):
                log.warning("%s line %d is broken and is left out", path, number)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, and none for step 0: that run begins anew. Atomic."""
    if not path.exists():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    dropped = 0
    with scratch.open("wb") as file:
        for line, record in iter_records(path):
            if 0 < step >= record["step"]:
                file.write(line)
            else:
                dropped += 1
    os.replace(scratch, path)
    if dropped:
        log.info("%s: %d lines after step %d removed, the run repeats them", path, dropped, step)
