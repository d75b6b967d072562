"""Telling weights from others of the same shapes without reading all of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers.utils import cached_file

from kd.model import PretrainedModel

SPOTS, SPOT_BYTES = 512, 4096


def weights_digest(model: PretrainedModel) -> str | None:
    """Of the weights that a config names: the commit of the hub, or what a folder holds.

    None: the folder holds no weights. Raises OSError or ValueError where there is no such model.
    """
    if Path(model.name).is_dir():
        return folder_digest(Path(model.name))
    config = cached_file(model.name, "config.json", revision=model.revision)
    assert config is not None
    return f"{model.name}@{Path(config).parent.name}"  # …/snapshots/COMMIT/config.json


def folder_digest(folder: Path) -> str | None:
    """Digest of a folder's config.json and files with weights; None: it has no such files.

    It is of their names and sizes, the headers of safetensors, and blocks of 4 KiB: one from the
    middle of each tensor (of 512 in a file, at most) and 512 that are spread over a file. Training
    changes nearly every number and so the digest; a change of few numbers by hand may escape it.
    Times and places of files do not count: a copy has the same digest.
    """
    hashed = hashlib.blake2b(digest_size=16)
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not weights:
        return None
    for path in [folder / "config.json", *weights]:
        size = path.stat().st_size
        hashed.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for spot in sorted(_spots(path, file, size)):
                hashed.update(os.pread(file.fileno(), SPOT_BYTES, spot))
    return hashed.hexdigest()


def _spots(path: Path, file: BinaryIO, size: int) -> set[int]:
    spots = set(np.linspace(0, max(0, size - SPOT_BYTES), SPOTS, dtype=np.int64).tolist())
    if path.suffix == ".safetensors":
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        spots |= set(range(0, 8 + length, SPOT_BYTES))
        offsets = [x["data_offsets"] for name, x in header.items() if name != "__metadata__"]
        middles = sorted(8 + length + (begin + end) // 2 for begin, end in offsets)
        spots |= set(middles[:: 1 + len(middles) // SPOTS])
    return spots
