"""Rows that are fetched while they are read: how fast, how many bytes, and how a run goes on.

    python scripts/bench_streaming.py

Parquet files of rows with an image each are served on loopback, every answer after `--latency-ms`
and at `--mbit` a second. The ranks of a machine read an epoch of them, one after the other, each
the rows that it would train on, decoded:

- kd: `data.streaming=true`;
- datasets: `load_dataset(streaming=True)`, `.shuffle` with a buffer of as many rows, and
  `split_dataset_by_node`, as trainers do that hand an iterable data set to their loader.

Then each goes on from the middle of the epoch, on a machine that has nothing yet; datasets from its
own `state_dict`. Whether the rows are those of the run that did not stop is compared. Bytes are
those that the server sent.
"""

from __future__ import annotations

import argparse
import http.server
import io
import itertools
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage

from kd.data import BatchStream, ConversationsConfig, Split

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
        "number": Value("string"),
    }
)


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder by byte ranges."""

    request_queue_size = 128

    def __init__(self, folder: Path, latency_s: float, bytes_per_s: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.content = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
        self.sent = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """The length."""
        self._answer(send=False)

    def do_GET(self) -> None:
        """A range, or the whole."""
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        content = self.server.content[self.path]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (
            (int(x or len(content)) for x in asked.groups()) if asked else (0, len(content))
        )
        part = content[first : last + 1]
        time.sleep(self.server.latency_s + send * len(part) / self.server.bytes_per_s)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        if send:
            self.server.sent += len(part)
            self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def write_files(folder: Path, files: int, rows: int, group: int, side: int) -> None:
    """Rows with a picture of noise each."""
    for file in range(files):
        made = [row(number, side) for number in range(file * rows, (file + 1) * rows)]
        table = Dataset.from_list(made, features=FEATURES).data.table
        pq.write_table(table, folder / f"rows-{file:03d}.parquet", row_group_size=group)


def row(number: int, side: int) -> dict[str, Any]:
    """One of them."""
    pixels_HWC = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels_HWC).save(file, "PNG")
    messages = [
        {"role": "user", "content": f"What is {number}?"},
        {"role": "assistant", "content": "A number."},
    ]
    images = [{"bytes": file.getvalue(), "path": None}]
    return {"messages": messages, "images": images, "number": str(number)}


Epoch = Callable[[int], Iterator[str]]
"""Rank -> the names of the rows that it reads, in their order."""


class Kd:
    """This project."""

    def __init__(self, urls: list[str], window: int, ranks: int, folder: Path):
        path = urls[0].replace("-000.", f"-{{000..{len(urls) - 1:03d}}}.")
        config = ConversationsConfig(
            path=path,
            streaming=True,
            val_fraction=0,
            shuffle_rows=window,
            id_column="number",
            cache_folder=str(folder),
        )
        self.rows, self.ranks = config.build("train"), ranks

    def read(self, rank: int, done: int = 0) -> Iterator[str]:
        """The rows of a rank after the first `done` of it."""
        stream = BatchStream(self.rows, list, Split(1, rank, self.ranks), seed=0)
        stream.seek(done * self.ranks)
        share = len(self.rows) // self.ranks
        return (row.id.split()[0] for (row,) in itertools.islice(stream, share - done))


class Datasets:
    """The library's own."""

    def __init__(self, urls: list[str], window: int, ranks: int, folder: Path):
        self.urls, self.window, self.ranks = urls, window, ranks
        self.states: dict[int, dict] = {}
        """Of rank 0, after so many of its rows; those that are asked for beforehand."""

    def read(self, rank: int, done: int = 0) -> Iterator[str]:
        """The rows of a rank after the first `done` of it, for which `states` has one."""
        rows = load_dataset("parquet", data_files=self.urls, split="train", streaming=True)
        rows = rows.shuffle(seed=0, buffer_size=self.window)
        rows = split_dataset_by_node(rows, rank, self.ranks)
        if done:
            rows.load_state_dict(self.states[done])
        for count, found in enumerate(rows, start=done + 1):
            for image in found["images"]:
                image.convert("RGB")
            if rank == 0 and count in self.states:
                self.states[count] = rows.state_dict()
            yield found["number"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=400, help="of a file")
    parser.add_argument("--group", type=int, default=50, help="rows of a row group")
    parser.add_argument("--side", type=int, default=128, help="pixels of an image")
    parser.add_argument("--window", type=int, default=200, help="rows shuffled together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--mbit", type=float, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        write_files(folder / "files", args.files, args.rows, args.group, args.side)
        server = Server(folder / "files", args.latency_ms / 1000, args.mbit * 1e6 / 8)
        total = sum(map(len, server.content.values()))
        urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in sorted(server.content)]
        num_rows = args.files * args.rows
        print(f"{num_rows} rows, {total / 1e6:.0f} MB")
        titles = ("first row", 10), ("rows/s", 7), ("bytes", 8), ("goes on", 8), ("same rows", 10)
        print(" " * 20, *(f"{title:>{width}}" for title, width in titles))
        for ranks, kind in itertools.product(args.ranks, (Kd, Datasets)):
            caches = (folder / f"cache-{kind.__name__}-{ranks}-{n}" for n in range(2))
            sizes = num_rows, args.window, ranks
            measure(kind, urls, *sizes, next(caches), next(caches), server, total)
        server.shutdown()


def measure(
    kind: type[Kd] | type[Datasets],
    urls: list[str],
    num_rows: int,
    window: int,
    ranks: int,
    folder: Path,
    other: Path,
    server: Server,
    total: int,
) -> None:
    """One line."""
    server.sent, start = 0, time.perf_counter()
    source, found, first_s = kind(urls, window, ranks, folder), [], 0.0
    half = num_rows // ranks // 2
    if isinstance(source, Datasets):
        source.states[half] = {}
    for rank in range(ranks):
        rows = source.read(rank)
        found.append([next(rows)])
        first_s = first_s or time.perf_counter() - start
        found[-1] += rows
    seconds, sent = time.perf_counter() - start, server.sent
    count = sum(map(len, found))
    start = time.perf_counter()
    later = kind(urls, window, ranks, other)
    if isinstance(source, Datasets) and isinstance(later, Datasets):
        later.states = source.states
    rest = later.read(0, half)
    got = [next(rest)]
    again_s = time.perf_counter() - start
    got += rest
    same = sum(a == b for a, b in zip(got, found[0][half:], strict=False)) / len(found[0][half:])
    label = f"{kind.__name__.lower()}, {ranks} rank{'s' * (ranks > 1)}"
    print(
        f"{label:<20} {first_s:>9.2f}s {count / seconds:>7.0f} {sent / total:>7.2f}x"
        f" {again_s:>7.2f}s {same:>10.0%}"
    )


if __name__ == "__main__":
    main()
