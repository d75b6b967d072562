"""Rows on disk or on the hub, read one at a time: JSON lines, Parquet, hub data sets."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kd.data.base import RowError
from kd.types import UserError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


class Table(Protocol):
    """Raw rows; image columns stay encoded."""

    root: Path
    """What relative image paths of the rows are relative to."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` by column; RowError where it cannot be read."""
        ...

    def row_id(self, index: int) -> str:
        """Where the row is, in words its owner can find it by."""
        ...


class JsonLines:
    """Files of one JSON object per line. Only where the lines start is kept in memory.

    Not an Arrow table: turns whose content is text here and a list there have no common type.
    """

    def __init__(self, files: list[Path]):
        self.files, self.root = files, files[0].parent
        found = [_line_starts(path) for path in files]
        self.file_of = np.repeat(np.arange(len(files)), [len(starts) for starts, _ in found])
        self.starts = np.concatenate([starts for starts, _ in found])
        self.lines = np.concatenate([lines for _, lines in found])

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`; RowError where the line is no JSON object."""
        with open(self.files[self.file_of[index]], "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise RowError(f"the line is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RowError("the line is JSON, but not an object")
        return row

    def row_id(self, index: int) -> str:
        """File and line, counted from 1."""
        return f"{self.files[self.file_of[index]].name}:{self.lines[index]}"


class ArrowTable:
    """A data set in Arrow form, mapped into memory rather than read."""

    def __init__(self, dataset: Dataset, name: str, root: Path):
        # The arrow format hands out images as they are stored; the default one would decode them.
        self.dataset = dataset.with_format("arrow")
        self.name, self.root = name, root

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        return self.dataset[index].to_pylist()[0]  # type: ignore[union-attr]

    def row_id(self, index: int) -> str:
        """Name and number, counted from 0."""
        return f"{self.name}:{index}"

    def require(self, columns: list[str]) -> None:
        """UserError unless all `columns` are there."""
        missing = [column for column in columns if column not in self.dataset.column_names]
        if missing:
            raise UserError(
                f"Data set {self.name} has no column {', '.join(missing)}; "
                f"it has {', '.join(self.dataset.column_names)}. Set the column names under data."
            )


def open_table(path: str, split: str, revision: str | None) -> Table:
    """The rows of a .jsonl or .parquet file, a glob of such, a folder, or a hub data set.

    `split` and `revision` are for folders and the hub. Raises UserError where there is nothing.
    """
    hub_name = HUB_NAME.fullmatch(path) and Path(path).suffix not in FILE_SUFFIXES
    if Path(path).is_dir() or (hub_name and not Path(path).exists()):
        return load_hub(path, split, revision)
    files = [Path(path)] if Path(path).is_file() else [Path(p) for p in sorted(glob.glob(path))]
    if not files:
        raise UserError(
            f"There is no data at '{path}'. Give a file, a folder, a glob or owner/name."
        )
    suffixes = {file.suffix for file in files}
    if suffixes == {".jsonl"}:
        return JsonLines(files)
    if suffixes == {".parquet"}:
        return _load("parquet", path, files[0].parent, "train", data_files=[str(f) for f in files])
    raise UserError(
        f"The data at '{path}' is {', '.join(sorted(suffixes))}; it can be .jsonl or .parquet."
    )


def load_hub(path: str, split: str, revision: str | None) -> ArrowTable:
    """A hub data set, or a local folder laid out as one; UserError where it cannot be had."""
    root = Path(path) if Path(path).is_dir() else Path()
    return _load(path, path, root, split, revision=revision)


def _load(
    builder: str,
    name: str,
    root: Path,
    split: str,
    *,
    revision: str | None = None,
    data_files: list[str] | None = None,
) -> ArrowTable:
    # Imported here: it takes a second, which users of the digits need not wait for.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(builder, split=split, revision=revision, data_files=data_files)
    except (OSError, ValueError, DatasetsError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"Cannot load split '{split}' of data set '{name}'{at}: {str(error).splitlines()[0]}. "
            f"Check the name and the network, or set data.path to a local copy."
        ) from error
    return ArrowTable(dataset, Path(name).name if root != Path() else name, root)


def _line_starts(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offset and number (from 1) of every line of `path` that is not blank."""
    starts, lines, offset = [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(offset)
                lines.append(number)
            offset += len(line)
    return np.array(starts, dtype=np.int64), np.array(lines, dtype=np.int64)
