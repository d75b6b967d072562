"""What a cache on disk holds: whose word, of what, and how it is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kd.files import write_atomic
from kd.teacher.base import Head
from kd.teacher.wire import pack_head
from kd.types import UserError

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """All values are JSON."""

    codec: dict[str, Any]
    """Its name and settings."""
    teacher: dict[str, Any]
    """What its word depends on, as far as that is known: weights, precision, how it reads."""
    stop_ids: list[int]
    vocab_size: int
    """Entries of the teacher's head."""
    head: str | None
    """File with the head, named by its content; None: what is kept are log-probs."""

    def refuse_other(self, folder: Path, codec: dict[str, Any], teacher: dict[str, Any]) -> None:
        """Raise UserError where it differs from what is asked for; other keys do not count."""
        mine = {"codec": self.codec, "teacher": self.teacher}
        found = [
            f"{part}.{key}: {mine[part].get(key, 'absent')} there, {value} asked for"
            for part, wanted in (("codec", codec), ("teacher", teacher))
            for key, value in wanted.items()
            if mine[part].get(key) != value
            and (part, key) != ("teacher", "name")  # a copy elsewhere is the same teacher
        ]
        if found:
            raise UserError(
                f"the cache {folder} is of another teacher or codec: {'; '.join(found)}\n"
                "Choose another folder, or remove that one"
            )

    def write(self, folder: Path) -> Manifest:
        """Create the file; the manifest of whoever came first. Raises OSError."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps({**content, "hash": _hash(content)}, indent=1)
        with contextlib.suppress(FileExistsError):
            write_atomic(folder / NAME, text, replace=False)
        found = read_manifest(folder)
        assert found is not None
        return found


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None: there is none yet. Raises UserError for a damaged one."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        matches = content.pop("hash") == _hash(content)
        version = content.pop("format")
    except (ValueError, KeyError, AttributeError):
        matches, version = False, None
    if matches and version != FORMAT:
        raise UserError(f"{path} is of format {version}, this version reads {FORMAT}: fill another")
    if not matches:
        raise UserError(f"{path} is damaged or was edited: choose another folder")
    return Manifest(**content)


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_head(folder: Path, weight_VD: Tensor, bias_V: Tensor | None) -> str:
    """Write a head's file; its name. Raises OSError."""
    body = pack_head(weight_VD, bias_V)
    name = f"head_{hashlib.blake2b(body, digest_size=16).hexdigest()}.safetensors"
    if not (folder / name).exists():
        write_atomic(folder / name, body)
    return name


def read_head(folder: Path, name: str) -> Head:
    """The head on the CPU. Raises UserError where the file is not what was written."""
    path = folder / name
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if name == f"head_{found}.safetensors":
            tensors = load_file(path)
            return Head(tensors["weight"], tensors.get("bias"))
    except (OSError, SafetensorError):
        pass
    raise UserError(f"{path} is missing or damaged: remove {folder} and fill it again")
