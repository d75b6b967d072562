"""Rows on disk or on the hub, read one at a time: JSON lines, Parquet, hub data sets."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kd.data.base import RowError
from kd.data.sampler import Epochs, Order
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

    def held_out(self, fraction: float) -> tuple[Table, Table]:
        """The rows to train on, and about `fraction` of all to validate on: always the same."""
        ...

    def sample(self, count: int) -> Table:
        """A fixed random choice of `count` rows, in their order."""
        ...

    def order(self, seed: int, shuffle: bool, stream: tuple[int, ...]) -> Order:
        """See `sampler.OrderedRows`."""
        ...


class RandomAccess:
    """Chooses single rows: any is as quick to reach as the next."""

    def held_out(self: Table, fraction: float) -> tuple[Table, Table]:
        """See `Table`."""
        count = round(fraction * len(self))
        order = np.random.default_rng(0).permutation(len(self))
        return Selection(self, np.sort(order[count:])), Selection(self, np.sort(order[:count]))

    def sample(self: Table, count: int) -> Table:
        """See `Table`."""
        order = np.random.default_rng(0).permutation(len(self))
        return Selection(self, np.sort(order[:count]))

    def order(self: Table, seed: int, shuffle: bool, stream: tuple[int, ...]) -> Order:
        """See `Table`."""
        return Epochs(len(self), seed=seed, shuffle=shuffle, stream=stream)


class Selection(RandomAccess):
    """The rows `index` of a table."""

    def __init__(self, table: Table, index: np.ndarray):
        self.table, self.index, self.root = table, index, table.root

    def __len__(self) -> int:
        return len(self.index)

    def row(self, index: int) -> dict[str, Any]:
        """See `Table`."""
        return self.table.row(int(self.index[index]))

    def row_id(self, index: int) -> str:
        """See `Table`."""
        return self.table.row_id(int(self.index[index]))


class JsonLines(RandomAccess):
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


class ArrowTable(RandomAccess):
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


def require_columns(wanted: list[str], present: list[str], name: str) -> None:
    """UserError unless all `wanted` columns are there."""
    missing = [column for column in wanted if column not in present]
    if missing:
        raise UserError(
            f"Data set {name} has no column {', '.join(missing)}; "
            f"it has {', '.join(present)}. Set the column names under data."
        )


def is_named(path: str) -> bool:
    """Whether `path` is a folder or the name of a hub data set, either of which has splits."""
    hub_name = HUB_NAME.fullmatch(path) and Path(path).suffix not in FILE_SUFFIXES
    return Path(path).is_dir() or bool(hub_name and not Path(path).exists())


def open_table(path: str, split: str, revision: str | None, required: list[str]) -> Table:
    """The rows of a .jsonl or .parquet file, a glob of such, a folder, or a hub data set.

    `split` and `revision` are for folders and the hub. Raises UserError where there is nothing, or
    where a table lacks one of the `required` columns.
    """
    if is_named(path):
        root = Path(path) if Path(path).is_dir() else Path()
        return _load(path, path, root, split, required, revision=revision)
    files = [Path(path)] if Path(path).is_file() else [Path(p) for p in sorted(glob.glob(path))]
    if not files:
        raise UserError(
            f"There is no data at '{path}'. Give a file, a folder, a glob or owner/name."
        )
    suffixes = {file.suffix for file in files}
    if suffixes == {".jsonl"}:
        return JsonLines(files)
    if suffixes == {".parquet"}:
        names = [str(file) for file in files]
        return _load("parquet", path, files[0].parent, "train", required, data_files=names)
    raise UserError(
        f"The data at '{path}' is {', '.join(sorted(suffixes))}; it can be .jsonl or .parquet."
    )


def _load(
    builder: str,
    name: str,
    root: Path,
    split: str,
    required: list[str],
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
        raise cannot_load(name, split, revision, error) from error
    name = Path(name).name if root != Path() else name
    require_columns(required, dataset.column_names, name)
    return ArrowTable(dataset, name, root)


def cannot_load(name: str, split: str, revision: str | None, error: Exception) -> UserError:
    """What to tell where a data set with splits cannot be had."""
    at = f" at revision {revision}" if revision else ""
    return UserError(
        f"Cannot load split '{split}' of data set '{name}'{at}: {str(error).splitlines()[0]}. "
        f"Check the name and the network, or set data.path to a local copy."
    )


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
