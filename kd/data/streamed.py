"""Parquet files that are not downloaded beforehand: row groups are fetched as they are needed.

Every row keeps its number, so order, resuming, ranks, mixtures and rollouts are what they are for
rows on disk. What it takes is that the order stays within few row groups at a time
(`sampler.BlockEpochs`), and that a row group is fetched once for all processes (`BlockCache`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np

from kd.data.base import DataConfig
from kd.data.blocks import BlockCache
from kd.data.sampler import BlockEpochs
from kd.data.tables import Table, cannot_load, is_named, open_table, require_columns
from kd.types import UserError, digest

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

T = TypeVar("T")

logger = logging.getLogger(__name__)

FOOTER_ATTEMPTS, ATTEMPTS, PAUSE_S = 3, 7, 1.0
"""The pauses between them double: a run is given up after a minute, its start after 3 seconds."""
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
FOOTERS_AT_ONCE = 16
FETCHES_AT_ONCE = 4
GIB = 2**30


@dataclass
class StreamableConfig(DataConfig):
    """Data options whose rows may be too many to download."""

    streaming: bool = False
    """Fetch the rows of Parquet files while training goes on, instead of all of them before."""
    shuffle_rows: int = 1000
    """Streaming: rows that are shuffled together, of row groups that are drawn at random."""
    cache_folder: str | None = None
    """Streaming: where the row groups fetched are kept; None: in the folder HF_HOME."""
    cache_gib: float = 20.0
    """Streaming: how much of them is kept; those used longest ago go first."""

    def validate(self) -> None:
        """Raise UserError on a value that cannot work."""
        super().validate()
        if self.shuffle_rows < 1 or not self.cache_gib > 0:
            raise UserError("data.shuffle_rows and data.cache_gib must be above 0.")
        for name in ("shuffle_rows", "cache_folder", "cache_gib"):
            if not self.streaming and getattr(self, name) != getattr(StreamableConfig, name):
                raise UserError(f"data.{name} is of use with data.streaming=true only.")

    def open_table(
        self, path: str, split: str, revision: str | None, required: list[str], optional: list[str]
    ) -> Table:
        """The rows of `path`; UserError where there are none, or one of the columns is missing."""
        if not self.streaming:
            return open_table(path, split, revision, required)
        urls = find_parquet(path, split, revision)
        folder = Path(self.cache_folder).expanduser() if self.cache_folder else default_folder()
        cache = BlockCache(folder, int(self.cache_gib * GIB))
        table = ParquetBlocks.open(urls, cache, self.shuffle_rows, required, optional)
        table.check_window()
        if Path(path).is_dir():  # as without streaming, wherever in it the files are
            table.root = Path(path)
        return table


@dataclass(frozen=True)
class Blocks:
    """Row groups, one entry of each array for each."""

    file: np.ndarray
    """Which file it is in."""
    group: np.ndarray
    """Which row group of that file it is."""
    first: np.ndarray
    """Which row of that file is its first."""
    size: np.ndarray
    """Its rows; a `sample` may use fewer than it has."""

    def choose(self, which: np.ndarray) -> Blocks:
        """Those of these numbers, in their order."""
        which = np.sort(which)
        return Blocks(self.file[which], self.group[which], self.first[which], self.size[which])


class ParquetBlocks:
    """The rows of Parquet files, of which only the footers are read beforehand."""

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        files: list[str],
        keys: list[str],
        blocks: Blocks,
        columns: list[str],
        cache: BlockCache,
        window_rows: int,
        root: Path,
        row_bytes: float,
    ):
        self.filesystem, self.files, self.keys = filesystem, files, keys
        self.blocks, self.columns, self.cache, self.root = blocks, columns, cache, root
        self.window_rows, self.row_bytes, self.pause_s = window_rows, row_bytes, PAUSE_S
        self.ends = np.cumsum(blocks.size)
        self._expected: queue.SimpleQueue[int] | None = None

    @staticmethod
    def open(
        urls: list[str],
        cache: BlockCache,
        window_rows: int,
        required: list[str],
        optional: list[str],
    ) -> ParquetBlocks:
        """Read the footers. UserError where one cannot be read or lacks a `required` column."""
        import fsspec

        filesystem, _ = fsspec.url_to_fs(urls[0])
        files = [str(filesystem._strip_protocol(url)) for url in urls]
        columns = [*required, *(name for name in optional if name not in required)]
        if len(files) > FOOTERS_AT_ONCE:
            logger.info("reading the footers of %d Parquet files", len(files))
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            footers = list(pool.map(lambda file: _footer(filesystem, file, required), files))
        keys = [digest(*(x.encode() for x in (f.key, *columns))).hex() for f in footers]
        sizes = [np.array(footer.sizes, dtype=np.int64) for footer in footers]
        groups = [np.arange(len(size)) for size in sizes]
        blocks = Blocks(
            np.repeat(np.arange(len(files)), [len(size) for size in sizes]),
            np.concatenate(groups),
            np.concatenate([np.cumsum(size) - size for size in sizes]),
            np.concatenate(sizes),
        )
        blocks = blocks.choose(np.flatnonzero(blocks.size))
        rows = int(blocks.size.sum())
        row_bytes = sum(footer.num_bytes for footer in footers) / max(1, rows)
        local = "file" in np.atleast_1d(filesystem.protocol)
        root = Path(files[0]).parent if local else Path()
        shared = columns, cache, window_rows, root, row_bytes
        return ParquetBlocks(filesystem, files, keys, blocks, *shared)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each block."""
        return self.blocks.size

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`; UserError where its block cannot be fetched."""
        block, place = self._place(index)
        table = self.cache.get(self._name(block), lambda: self._fetch(block))
        return table.slice(place, 1).to_pylist()[0]

    def row_id(self, index: int) -> str:
        """File and number in it, counted from 0."""
        block, place = self._place(index)
        name = PurePosixPath(self.files[self.blocks.file[block]]).name
        return f"{name}:{self.blocks.first[block] + place}"

    def held_out(self, fraction: float) -> tuple[ParquetBlocks, ParquetBlocks]:
        """See `Table`. Whole blocks; UserError where none would be left to train on."""
        chosen = self._random_blocks(round(fraction * len(self)))
        if len(chosen) == len(self.sizes):
            raise UserError(
                f"data.streaming holds out whole row groups, but {self._described} has "
                f"{len(self.sizes)} of them. Give data.validation_path or data.validation_split, "
                "or data.val_fraction=0 with train.val_every=null."
            )
        rest = np.setdiff1d(np.arange(len(self.sizes)), chosen)
        return self._chosen(self.blocks.choose(rest)), self._chosen(self.blocks.choose(chosen))

    def sample(self, count: int) -> ParquetBlocks:
        """See `Table`. Of whole blocks, but for one."""
        drawn = self._random_blocks(count)
        blocks = self.blocks.choose(drawn)
        blocks.size[np.searchsorted(np.sort(drawn), drawn[-1])] -= blocks.size.sum() - count
        return self._chosen(blocks)

    def expect(self, blocks: np.ndarray) -> None:
        """Begin to fetch these blocks, in this order and in place of those asked for before."""
        if self._expected is None:
            self._expected = queue.SimpleQueue()
            for _ in range(FETCHES_AT_ONCE):
                threading.Thread(target=self._fetch_expected, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            while True:
                self._expected.get_nowait()
        for block in blocks:
            self._expected.put(int(block))

    def order(self, seed: int, shuffle: bool, stream: tuple[int, ...]) -> BlockEpochs:
        """See `Table`. It stays within few blocks at a time."""
        return BlockEpochs(
            self.sizes,
            seed=seed,
            shuffle=shuffle,
            window_rows=self.window_rows,
            stream=stream,
            expect=self.expect,
        )

    def check_window(self) -> None:
        """UserError where the cache does not hold what is shuffled together, and what is next."""
        need = 2 * self.row_bytes * (self.window_rows + int(self.sizes.max(initial=0)))
        if need > self.cache.limit_bytes:
            raise UserError(
                f"data.shuffle_rows={self.window_rows} takes about {need / GIB:.2g} GiB of "
                f"{self._described}, more than data.cache_gib={self.cache.limit_bytes / GIB:.2g}: "
                "row groups would be fetched again and again. Raise the one or lower the other."
            )

    @property
    def _described(self) -> str:
        return self.files[0] + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def _place(self, index: int) -> tuple[int, int]:
        block = int(np.searchsorted(self.ends, index, side="right"))
        return block, int(index - self.ends[block] + self.sizes[block])

    def _name(self, block: int) -> str:
        return f"{self.keys[self.blocks.file[block]]}-{self.blocks.group[block]}"

    def _random_blocks(self, rows: int) -> np.ndarray:
        """The first of a fixed order, as many as have so many rows."""
        order = np.random.default_rng(0).permutation(len(self.sizes))
        before = np.cumsum(self.sizes[order]) - self.sizes[order]
        return order[before < rows]

    def _chosen(self, blocks: Blocks) -> ParquetBlocks:
        return ParquetBlocks(
            self.filesystem,
            self.files,
            self.keys,
            blocks,
            self.columns,
            self.cache,
            self.window_rows,
            self.root,
            self.row_bytes,
        )

    def _fetch(self, block: int) -> pa.Table:
        file, group = self.files[self.blocks.file[block]], int(self.blocks.group[block])

        def read(parquet: Any) -> pa.Table:
            names = [name for name in self.columns if name in parquet.schema_arrow.names]
            return parquet.read_row_group(group, columns=names)

        return _read(self.filesystem, file, read, ATTEMPTS, self.pause_s)

    def _fetch_expected(self) -> None:
        expected = self._expected
        assert expected is not None
        while True:
            block = expected.get()
            with contextlib.suppress(UserError):  # who needs the block will be told
                self.cache.have(self._name(block), lambda block=block: self._fetch(block))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_expected": None}


@dataclass(frozen=True)
class Footer:
    """What there is to know of a file beforehand."""

    sizes: list[int]
    """Rows of its row groups."""
    num_bytes: int
    """Of the rows, before compression."""
    key: str
    """Another one for other contents."""


def _footer(filesystem: AbstractFileSystem, file: str, required: list[str]) -> Footer:
    def read(parquet: Any) -> Footer:
        require_columns(required, parquet.schema_arrow.names, PurePosixPath(file).name)
        metadata = parquet.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return Footer(
            [group.num_rows for group in groups],
            sum(group.total_byte_size for group in groups),
            # It has the place, the size and often the extremes of every column of every row group.
            digest(file.encode(), pickle.dumps(metadata)).hex(),
        )

    return _read(filesystem, file, read, FOOTER_ATTEMPTS, PAUSE_S)


def _read(
    filesystem: AbstractFileSystem,
    file: str,
    read: Callable[[Any], T],
    attempts: int,
    pause_s: float,
) -> T:
    """What `read` makes of a Parquet file, tried again where the way there fails."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for attempt in range(attempts):
        try:
            # Only what is asked for: the default reads ahead.
            with filesystem.open(file, "rb", cache_type="none") as opened:
                return read(pq.ParquetFile(opened, pre_buffer=True))
        except pa.ArrowException as error:
            raise UserError(f"{file} cannot be read as Parquet: {error}") from error
        except _transient() as error:
            # Over HTTP, FileNotFoundError stands for whatever went wrong: its cause tells.
            cause = error.__cause__ or error
            if isinstance(cause, FileNotFoundError) or attempt == attempts - 1:
                reason = str(cause) or type(cause).__name__
                raise UserError(f"{file} cannot be fetched: {reason}") from error
            time.sleep(pause_s * 2**attempt)
    raise AssertionError


def _transient() -> tuple[type[Exception], ...]:
    errors = (OSError, asyncio.TimeoutError, httpx.HTTPError)
    with contextlib.suppress(ImportError):  # of http:// alone
        import aiohttp

        return (*errors, aiohttp.ClientError)
    return errors


def find_parquet(path: str, split: str, revision: str | None) -> list[str]:
    """The Parquet files of a folder, a hub data set, a glob or a URL; UserError where none are."""
    import fsspec
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    if is_named(path):
        try:
            found = load_dataset_builder(path, revision=revision).config.data_files or {}
        except (OSError, ValueError, DatasetsError) as error:
            raise cannot_load(path, split, revision, error) from error
        if split not in found:
            raise UserError(
                f"Data set '{path}' has no split '{split}', but {', '.join(map(str, found))}."
            )
        urls = [str(url) for url in found[split]]
    else:
        try:
            filesystem, _, files = fsspec.get_fs_token_paths(expanded(path))
        except ImportError as error:
            extra = 'pip install "kd-vlm[http]"' if path.startswith("http") else str(error)
            raise UserError(f"'{path}' needs what is not installed: {extra}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be streamed: {error}") from error
        urls = [filesystem.unstrip_protocol(file) for file in files]
    if not urls:
        raise UserError(
            f"There is no data at '{path}'. Give a file, a folder, a glob, a URL or owner/name."
        )
    others = sorted({PurePosixPath(urlsplit(url).path).suffix for url in urls} - {".parquet"})
    if others:
        raise UserError(
            f"data.streaming=true reads Parquet files; '{path}' has {', '.join(others)}. Of most "
            "data sets on the hub there is a Parquet copy: "
            "data.revision=refs/convert/parquet. Files on disk need no streaming."
        )
    return urls


def expanded(path: str) -> list[str]:
    """What a path with numbers like {000..127} stands for; itself where there are none."""
    found = NUMBERS.search(path)
    if found is None:
        return [path]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    rests = expanded(path[found.end() :])
    return [path[: found.start()] + number + rest for number in numbers for rest in rests]


def default_folder() -> Path:
    """Beside what else is kept of the hub."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "kd_blocks"
