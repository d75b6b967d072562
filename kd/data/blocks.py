"""Blocks of rows that were fetched, as files on this machine that all its processes share."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from kd.types import UserError, digest

if TYPE_CHECKING:
    import pyarrow as pa

LOCKS = 256
OPEN_TABLES = 64


class BlockCache:
    """Arrow files of one block each, mapped into memory rather than read.

    Who asks first fetches, others wait for it. Beyond `limit_bytes` those used longest ago go.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._open: OrderedDict[str, pa.Table] = OrderedDict()

    def get(self, name: str, fetch: Callable[[], pa.Table]) -> pa.Table:
        """The block of that name, fetched where it is not there."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        self.have(name, fetch)
        while (table := self._mapped(name)) is None:  # gone between the two lines
            self.have(name, fetch)
        self._open[name] = table
        if len(self._open) > OPEN_TABLES:
            self._open.popitem(last=False)
        return table

    def have(self, name: str, fetch: Callable[[], pa.Table]) -> None:
        """See that the block is there."""
        path = self._path(name)
        if path.exists():
            return
        number = int.from_bytes(digest(name.encode())[:2], "little") % LOCKS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{number}.lock"):
                if not path.exists():
                    self._write(path, fetch())
                    self._make_room(path)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {error.strerror or error}. Give "
                "data.cache_folder another place, or less to hold by data.cache_gib"
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.arrow"

    def _mapped(self, name: str) -> pa.Table | None:
        import pyarrow as pa

        try:
            with contextlib.closing(pa.memory_map(str(self._path(name)))) as file:
                table = pa.ipc.open_file(file).read_all()
            os.utime(self._path(name))
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid:  # as a machine leaves it that loses its power
            self._path(name).unlink(missing_ok=True)
            return None
        return table

    def _write(self, path: Path, table: pa.Table) -> None:
        import pyarrow as pa

        for left in self.folder.glob(f"{path.stem}.*.part"):  # by one that was killed
            left.unlink(missing_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, kept: Path) -> None:
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                used.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if total <= self.limit_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)  # those who have it open keep it
                total -= size

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}
