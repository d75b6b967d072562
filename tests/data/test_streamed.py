"""Rows that are fetched while they are read: the same rows, each row group once, wherever it is."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from kd.data import BatchStream, ConversationsConfig, MedPixConfig, MixtureConfig, Split
from kd.data.mixture import MixedRows
from kd.data.sampler import BlockEpochs
from kd.data.streamed import ParquetBlocks
from kd.types import Rejected, Sample, UserError
from tests.processes import completed, environment, python

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
        "number": Value("string"),
        "wide": Value("string"),
    }
)
FILES, FILE_ROWS, GROUP_ROWS = 3, 22, 5
"""Every file ends with a row group of two rows."""


def as_rows(rows: list[Any]) -> list[Any]:
    return rows


def row(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": str(number + 1)},
        ],
        "images": [],
        "number": str(number),
        # Longer than what is read for a footer, which would have the row groups in it.
        "wide": np.random.default_rng(number).bytes(20_000).hex(),
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as a data set on the hub."""
    folder = tmp_path_factory.mktemp("shards")
    for file in range(FILES):
        rows = [row(number) for number in range(file * FILE_ROWS, (file + 1) * FILE_ROWS)]
        name = f"train-{file:05d}-of-{FILES:05d}.parquet"
        table = Dataset.from_list(rows, features=FEATURES).data.table
        pq.write_table(table, folder / name, row_group_size=GROUP_ROWS)
    table = Dataset.from_list([row(1000 + n) for n in range(4)], features=FEATURES).data.table
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def streamed(shards: Path, tmp_path: Path) -> partial[ConversationsConfig]:
    """The data option, with a cache of its own."""
    return partial(
        ConversationsConfig,
        path=str(shards),
        streaming=True,
        shuffle_rows=12,
        cache_folder=str(tmp_path / "cache"),
        val_fraction=0,
        id_column="number",
    )


def numbers(rows: Any) -> list[int]:
    return [int(row.id.split()[0]) for row in rows]


def read(stream: BatchStream, steps: int) -> list[int]:
    return numbers(itertools.chain.from_iterable(itertools.islice(stream, steps)))


# ---- order ---------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    window=st.integers(1, 50),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_epoch_has_every_row_once_and_few_blocks_at_a_time(sizes, window, seed, shuffle):
    told: list[set[int]] = []
    order = BlockEpochs(
        np.array(sizes),
        seed=seed,
        shuffle=shuffle,
        window_rows=window,
        expect=lambda blocks: told.append(set(blocks.tolist())),
    )
    total = sum(sizes)
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    rows = []
    for slot in range(3 * total):
        rows.append(order.row(slot))
        assert block_of[rows[-1]] in told[-1]
    epochs = [rows[i * total : (i + 1) * total] for i in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if not shuffle:
        assert all(epoch == list(range(total)) for epoch in epochs)
    # A window is left when its rows are used up: no block comes back before the next epoch.
    for epoch in epochs:
        last = {block: place for place, block in enumerate(block_of[epoch])}
        first = {
            block: epoch.index(next(r for r in epoch if block_of[r] == block)) for block in last
        }
        assert all(last[b] - first[b] < window + 2 * max(sizes) for b in last)
    again = BlockEpochs(
        np.array(sizes),
        seed=seed,
        shuffle=shuffle,
        window_rows=window,
        expect=lambda blocks: None,
    )
    places = np.random.default_rng(0).permutation(3 * total)[:40]
    assert [again.row(int(slot)) for slot in places] == [rows[slot] for slot in places]


def test_order_is_new_in_every_epoch_and_by_the_seed(streamed):
    rows = streamed().build("train")
    total = FILES * FILE_ROWS
    first, second = (BatchStream(rows, as_rows, Split(total), seed=s) for s in (0, 1))
    epochs = [read(first, 1), read(first, 1), read(second, 1)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Row groups of different files are neighbours, and their rows are mixed.
    files = {number // FILE_ROWS for number in epochs[0][:20]}
    assert len(files) > 1
    assert any(abs(a - b) > 1 for a, b in itertools.pairwise(epochs[0][:GROUP_ROWS]))


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 2), (4, 3)])
def test_a_step_reads_the_same_rows_on_any_number_of_ranks_and_after_a_stop(streamed, world, size):
    rows = streamed().build("train")
    accum = 12 // (world * size)
    streams = [BatchStream(rows, as_rows, Split(size, r, world), seed=3) for r in range(world)]
    whole = BatchStream(rows, as_rows, Split(12), seed=3)
    steps = [set(read(whole, 1)) for _ in range(12)]
    assert [set().union(*(read(s, accum) for s in streams)) for _ in range(12)] == steps
    later = BatchStream(streamed().build("train"), as_rows, Split(12), seed=3)
    later.seek(5 * 12)
    assert [set(read(later, 1)) for _ in range(7)] == steps[5:]


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "glob", "file", "url"])
def test_rows_are_those_of_the_files(shards, streamed, where):
    first = f"{shards}/train-00000-of-00003.parquet"
    paths = {"folder": str(shards), "glob": f"{shards}/train*.parquet", "file": first}
    path = paths.get(where, f"file://{first}")
    rows = streamed(path=path).build("train")
    plain = ConversationsConfig(path=path.removeprefix("file://"), val_fraction=0).build("train")
    assert len(rows) == len(plain) == (FILE_ROWS if where in ("file", "url") else 66)
    for index in range(len(rows)):
        got, expected = rows[index], plain[index]
        assert isinstance(got, Sample) and isinstance(expected, Sample)
        assert (got.messages, got.answer) == (expected.messages, expected.answer)
    name = f"train-{len(rows) // FILE_ROWS - 1:05d}-of-00003.parquet"
    assert rows[len(rows) - 1].id == f"{len(rows) - 1} ({name}:21)"


def test_images_and_medpix(tmp_path):
    colours = ["red", "green", "blue"]
    images = [PILImage.new("RGB", (8, 8), colour) for colour in colours]
    features = Features(
        {"image_id": Image(), "question": Value("string"), "answer": Value("string")}
    )
    rows = [
        {"image_id": image, "question": "Which?", "answer": colour}
        for image, colour in zip(images, colours, strict=True)
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
    config = MedPixConfig(path=str(tmp_path), streaming=True, cache_folder=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        found = config.build(split)
        got = [sample for sample in map(found.__getitem__, range(3)) if isinstance(sample, Sample)]
        assert [sample.answer for sample in got] == colours
        assert [sample.images[0].tobytes() for sample in got] == [i.tobytes() for i in images]


def test_validation_rows_are_of_row_groups_of_their_own(streamed):
    config = streamed(val_fraction=0.2)
    train, held_out = config.build("train"), config.build("validation")
    kept, held = ({*numbers(rows[i] for i in range(len(rows)))} for rows in (train, held_out))
    assert kept | held == set(range(66)) and not kept & held
    assert 14 <= len(held) < 14 + GROUP_ROWS  # 0.2 of 66 rows are 13
    groups = {(number // FILE_ROWS, number % FILE_ROWS // GROUP_ROWS) for number in held}
    assert not groups & {(n // FILE_ROWS, n % FILE_ROWS // GROUP_ROWS) for n in kept}
    assert numbers(held_out[i] for i in range(3)) == numbers(
        config.build("validation")[i] for i in range(3)
    )


@pytest.mark.parametrize("count", [1, 6, 13, 66])
def test_val_samples_is_a_fixed_choice(streamed, count):
    config = streamed(validation_split="train", val_samples=count)
    rows = config.build("validation")
    chosen = numbers(rows[i] for i in range(len(rows)))
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    again = config.build("validation")
    assert chosen == numbers(again[i] for i in range(count))


def test_in_a_mixture(streamed):
    digits = ConversationsConfig(path=streamed().path, split="test", val_fraction=0)
    mixture = MixtureConfig(
        datasets={"far": streamed(shuffle=False), "near": digits}, weights={"far": 3, "near": 1}
    )
    rows = mixture.build("train")
    assert isinstance(rows, MixedRows)
    stream = BatchStream(rows, as_rows, Split(40), seed=1)
    first = next(stream)
    far = [int(row.id.split()[0].removeprefix("far/")) for row in first if row.dataset == "far"]
    assert far == list(range(len(far))) and 20 < len(far) < 40
    late = BatchStream(mixture.build("train"), as_rows, Split(1), seed=1)
    late.seek(25)
    assert [next(late)[0].id for _ in range(15)] == [row.id for row in first[25:]]


# ---- how it is fetched ---------------------------------------------------------------------------


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Files by byte ranges, as servers of data sets give them; counts, and fails when told to."""

    folder: Path
    failures: int
    ranges: list[tuple[str, int, int]]

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        kind = type(self)
        if send and kind.failures > 0:
            kind.failures -= 1
            return self.send_error(503)
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(x) for x in asked.groups()) if asked else (0, len(content) - 1)
        last = min(last, len(content) - 1)
        if send:
            kind.ranges.append((self.path, first, last))
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if send:
            self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(handler: type[RangeHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, type[RangeHandler]]]:
    """Its address, and what it was asked for."""
    handler = type("Handler", (RangeHandler,), {"folder": shards, "failures": 0, "ranges": []})
    with serve(handler) as url:
        yield url, handler


URL = "train-{00000..00002}-of-00003.parquet"


def column_reads(ranges: list[tuple[str, int, int]], shards: Path) -> Counter:
    """How often each (file, row group) was read, by where its messages begin."""
    starts = {}
    for path in shards.glob("train*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(0)
            starts[f"/{path.name}", group] = (
                column.dictionary_page_offset or column.data_page_offset
            )
    return Counter(
        key
        for path, first, last in ranges
        for key, start in starts.items()
        if path == key[0] and first <= start <= last
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_group_is_fetched_once_for_all_processes(server, streamed, shards, num_workers):
    url, handler = server
    rows = streamed(path=f"{url}/{URL}").build("train")
    assert len(rows) == 66
    footers = len(handler.ranges)
    ranks = [
        BatchStream(rows, as_rows, Split(6, rank, 2), seed=0, num_workers=num_workers)
        for rank in range(2)
    ]
    got = [read(rank, 12) for rank in ranks]  # more than two epochs
    assert set(got[0]) | set(got[1]) == set(range(66))
    reads = column_reads(handler.ranges[footers:], shards)
    assert len(reads) == FILES * 5 and set(reads.values()) == {1}
    again = streamed(path=f"{url}/{URL}").build("train")  # as a resumed run does
    assert numbers(again[i] for i in range(66)) == list(range(66))
    assert column_reads(handler.ranges[footers:], shards) == reads


def test_columns_that_are_not_asked_for_stay_where_they_are(server, streamed, tmp_path):
    url, _ = server
    rows = streamed(path=f"{url}/{URL}").build("train")
    rows[0]
    (block,) = (tmp_path / "cache").glob("*.arrow")
    assert pa.ipc.open_file(block).schema.names == ["messages", "images", "number"]


def test_beyond_its_limit_the_cache_lets_go_of_the_oldest(streamed, tmp_path):
    rows = streamed().build("train")
    table = rows.table
    assert isinstance(table, ParquetBlocks)
    rows[0]
    (first,) = (tmp_path / "cache").glob("*.arrow")
    table.cache.limit_bytes = 3 * first.stat().st_size
    everything = numbers(rows[i] for i in range(66))
    assert everything == list(range(66))
    left = list((tmp_path / "cache").glob("*.arrow"))
    assert 1 <= len(left) <= 3 and first not in left
    assert numbers(rows[i] for i in range(66)) == everything
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_block_that_was_not_written_whole_is_fetched_anew(streamed, tmp_path):
    assert numbers([streamed().build("train")[0]]) == [0]
    (block,) = (tmp_path / "cache").glob("*.arrow")
    content = block.read_bytes()
    for cut in (0, len(content) // 2):
        block.write_bytes(content[:cut])
        assert numbers([streamed().build("train")[0]]) == [0]
        assert block.read_bytes() == content


def test_what_a_killed_process_left_of_a_block_is_removed(streamed, tmp_path):
    streamed().build("train")[0]
    (block,) = (tmp_path / "cache").glob("*.arrow")
    block.unlink()
    block.with_suffix(".99999999.part").write_bytes(b"half")
    assert numbers([streamed().build("train")[0]]) == [0]
    assert block.exists() and not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("streaming", [False, True])
def test_image_paths_in_a_folder_are_relative_to_it(tmp_path, png, streaming):
    png("rows/red.png", "red")
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    answer = [{"type": "text", "text": "Red."}]
    turns = {"user": content, "assistant": answer}
    messages = [{"role": role, "content": parts} for role, parts in turns.items()]
    (tmp_path / "rows" / "data").mkdir()
    rows = Dataset.from_list([{"messages": messages, "images": ["red.png"]}])
    rows.to_parquet(tmp_path / "rows" / "data" / "train-00000-of-00001.parquet")
    cache = {"streaming": True, "cache_folder": str(tmp_path / "cache")} if streaming else {}
    config = ConversationsConfig(path=str(tmp_path / "rows"), val_fraction=0, **cache)
    sample = config.build("train")[0]
    assert isinstance(sample, Sample) and sample.images[0].getpixel((0, 0)) == (255, 0, 0)


def test_other_contents_under_the_same_name_are_fetched_anew(streamed, tmp_path):
    path = tmp_path / "rows.parquet"
    for offset in (0, 500):
        rows = Dataset.from_list([row(offset + n) for n in range(4)], features=FEATURES)
        pq.write_table(rows.data.table, path)
        assert numbers([streamed(path=str(path)).build("train")[0]]) == [offset]


class HubHandler(RangeHandler):
    """A stand-in for the hub: the answers of it that the libraries ask for, for one data set."""

    COMMIT = "0123456789" * 4

    def _answer(self, send: bool) -> None:
        path = self.path.split("?")[0]
        files = sorted(self.folder.glob("*.parquet"))
        if re.fullmatch(r"/api/datasets/me/rows(/revision/\w+)?", path):
            names = [{"rfilename": file.name} for file in files]
            self._json({"_id": "1", "id": "me/rows", "sha": self.COMMIT, "siblings": names})
        elif path == f"/api/datasets/me/rows/tree/{self.COMMIT}":
            kind = {"type": "file", "oid": "0"}
            self._json([{**kind, "path": f.name, "size": f.stat().st_size} for f in files])
        elif found := re.fullmatch(rf"/datasets/me/rows/resolve/{self.COMMIT}/(.*\.parquet)", path):
            self.path = f"/{found[1]}"
            super()._answer(send)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


READ_HUB = """
from kd.data import ConversationsConfig
rows = ConversationsConfig(path="me/rows", streaming=True, val_fraction=0).build("train")
print(len(rows), [rows[number].answer for number in (0, 30, 65)], rows[65].id)
"""


def test_a_data_set_on_the_hub(shards, tmp_path):
    settings = {"folder": shards, "failures": 0, "ranges": []}
    handler = type("Handler", (HubHandler,), settings)
    with serve(handler) as url:
        offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        out = completed(*python("-c", READ_HUB), env=environment(**offline))
    assert out.stdout.strip() == "66 ['1', '31', '66'] train-00002-of-00003.parquet:21", out.stderr
    assert set(column_reads(handler.ranges, shards).values()) == {1}
    size = sum(path.stat().st_size for path in shards.glob("train*"))
    assert sum(last + 1 - first for _, first, last in handler.ranges) < size / 4
    assert len(list((tmp_path / "home" / "kd_blocks").glob("*.arrow"))) == 3


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_that_stumbles_is_asked_again_and_one_that_is_gone_is_told_of(
    server, streamed, num_workers, monkeypatch
):
    url, handler = server
    monkeypatch.setattr("kd.data.streamed.PAUSE_S", 0.01)
    rows = streamed(path=f"{url}/{URL}").build("train")
    handler.failures = 2
    stream = BatchStream(rows, as_rows, Split(3), seed=0)
    assert len(read(stream, 1)) == 3
    handler.failures = 10**6
    stream = BatchStream(rows, as_rows, Split(60), seed=0, num_workers=num_workers)
    with pytest.raises(UserError) as told:
        next(stream)
    assert re.fullmatch(r"http://\S+\.parquet cannot be fetched: 503, .*", str(told.value))
    handler.failures = 0
    stream.seek(0)
    assert len(read(stream, 1)) == 60


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "no/such/*.parquet"}, "There is no data at"),
        ({"path": "gone.parquet"}, "cannot be fetched"),
        ({"path": __file__}, r"reads Parquet files; .* has \.py"),
        ({"split": "tset"}, "has no split 'tset', but "),
        ({"path": "s3://x/y.parquet"}, "needs what is not installed: Install s3fs"),
        ({"path": "nowhere://x/y.parquet"}, "cannot be streamed: Protocol not known"),
        ({"messages_column": "turns"}, "has no column turns; it has messages"),
        ({"cache_gib": 1e-9}, "data.shuffle_rows=12 takes about .* more than data.cache_gib="),
        ({"shuffle_rows": 0}, "must be above 0"),
        ({"streaming": False}, "data.shuffle_rows is of use with data.streaming=true only"),
        ({"val_fraction": 0.99}, "holds out whole row groups, but .* has 15 of them"),
        ({"val_samples": 67, "validation_split": "train"}, "validation split has 66 rows"),
    ],
)
def test_refusals(streamed, settings, said):
    with pytest.raises(UserError, match=said):
        streamed(**settings).build("validation" if "val_samples" in settings else "train")


def test_a_file_that_is_no_parquet_and_a_folder_that_cannot_be_written(streamed, tmp_path):
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as Parquet"):
        streamed(path=str(tmp_path / "bad.parquet")).build("train")
    (tmp_path / "taken").write_text("a file")
    rows = streamed(cache_folder=str(tmp_path / "taken")).build("train")
    with pytest.raises(UserError, match=r"taken cannot be written: .*data\.cache_folder"):
        rows[0]


def test_a_broken_row_is_told_of_as_in_other_files(streamed, tmp_path):
    rows = [row(0), row(1) | {"messages": [{"role": "user", "content": "No answer."}]}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    broken = streamed(path=str(path)).build("train")[1]
    assert isinstance(broken, Rejected)
    assert broken.id == "1 (rows.parquet:1)" and "no answer" in broken.reason
