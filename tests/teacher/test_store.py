from __future__ import annotations

import json
import multiprocessing
import os
import resource
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.teacher.manifest import Manifest, read_head, read_manifest, write_head
from kd.teacher.store import Store, damage, segment_paths
from kd.types import UserError, digest
from tests.processes import LIMIT_S, join


def key(i: int) -> bytes:
    return digest(str(i).encode())


def row(i: int) -> np.ndarray:
    """What belongs to row `i`."""
    return np.random.default_rng(i).integers(0, 256, 200 + i % 7, dtype=np.uint8)


def fill(folder: Path, numbers: range, rows_at_a_time: int = 10) -> Store:
    store = Store(folder)
    for i in numbers:
        store.put(key(i), row(i))
        if i % rows_at_a_time == rows_at_a_time - 1:
            store.publish()
    store.publish()
    return store


def check(folder: Path, numbers: range) -> None:
    store = Store(folder)
    for i in numbers:
        found = store.get(key(i))
        assert found is not None and np.array_equal(found, row(i)), i


def test_rows_are_found_before_and_after_they_are_published(tmp_path):
    store = Store(tmp_path / "segments")
    assert store.get(key(0)) is None and len(store) == 0
    store.put(key(0), row(0))
    store.put(key(0), row(1))  # the first stays
    assert key(0) in store and np.array_equal(store.get(key(0)), row(0))
    assert not (tmp_path / "segments").exists()
    store.publish()
    store.publish()
    assert len(segment_paths(tmp_path / "segments")) == 1
    for view in (store, Store(tmp_path / "segments")):
        assert np.array_equal(view.get(key(0)), row(0))
        assert len(view) == 1


def test_what_others_publish_is_found_after_a_refresh(tmp_path):
    reader = Store(tmp_path)
    fill(tmp_path, range(5))
    assert reader.get(key(3)) is None
    reader.refresh()
    assert np.array_equal(reader.get(key(3)), row(3))


def test_it_is_published_when_much_waits_or_for_long(tmp_path, monkeypatch):
    store = Store(tmp_path)
    assert not store.is_due
    monkeypatch.setattr("kd.teacher.store.SEGMENT_BYTES", 300)
    store.put(key(0), row(0))
    assert not store.is_due
    store.put(key(1), row(1))
    assert store.is_due
    store.publish()
    assert not store.is_due
    monkeypatch.setattr("kd.teacher.store.PUBLISH_S", 0.05)
    store.put(key(2), row(2))
    time.sleep(0.06)
    assert store.is_due


def writer(folder: Path, numbers: range) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=fill, args=(folder, numbers))
    process.start()
    return process


def test_writers_at_the_same_time(tmp_path):
    """Two processes, half of whose rows are the same, and a reader among them."""
    writers = [writer(tmp_path, range(300)), writer(tmp_path, range(150, 450))]
    reader = Store(tmp_path)
    while any(process.is_alive() for process in writers):
        reader.refresh()
        for i in range(0, 450, 50):
            found = reader.get(key(i))
            assert found is None or np.array_equal(found, row(i))
    assert [process.exitcode for process in writers] == [0, 0]
    check(tmp_path, range(450))
    assert not list(damage(segment_paths(tmp_path)))
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_killed_while_it_fills(tmp_path):
    for round_ in range(2):  # the second goes on after the first
        enough = 10 * (round_ + 1)
        process = writer(tmp_path, range(10**6))
        while len(segment_paths(tmp_path)) < enough:
            assert process.is_alive()
        process.kill()
        join(process)
        published = len(Store(tmp_path))
        assert published >= 10 * enough - 10
        check(tmp_path, range(published))
        assert not list(damage(segment_paths(tmp_path)))


def test_leavings_of_the_killed_are_removed_when_they_are_old(tmp_path):
    fresh, old = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    for path in (fresh, old):
        path.write_bytes(b"half a segm")
    os.utime(old, (0, 0))
    check(tmp_path, range(0))
    fill(tmp_path, range(5))
    assert fresh.exists() and not old.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path, keep):
    fill(tmp_path, range(20))
    path = segment_paths(tmp_path)[0]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=f"{path.name} is damaged .*\nRemove this file"):
        Store(tmp_path)
    assert [found for found, _ in damage(segment_paths(tmp_path))] == [path]
    path.unlink()
    fill(tmp_path, range(20))
    check(tmp_path, range(20))


def test_a_flipped_bit_never_gives_another_row(tmp_path):
    """Anywhere in the file: it is refused, or the row is the one that was put, or is not found."""
    store = fill(tmp_path, range(8), rows_at_a_time=100)
    (path,) = segment_paths(tmp_path)
    whole = path.read_bytes()
    outcomes = set()
    for place in [*range(0, 700, 3), *range(700, len(whole), 37)]:
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        damaged = bool(list(damage([path])))
        for i in range(8):
            try:
                found = Store(tmp_path).get(key(i))
            except UserError as error:
                assert path.name in str(error)
                outcomes.add("refused")
                assert damaged
            else:
                outcomes.add("missed" if found is None else "found")
                assert found is None or np.array_equal(found, row(i)), place
                assert found is not None or damaged
    assert outcomes == {"refused", "missed", "found"}
    assert len(store) == 8


def test_a_disk_that_is_full(tmp_path):
    """As a limit on the size of files: the system refuses the write itself."""
    fill(tmp_path, range(10))
    before = sorted(tmp_path.iterdir())
    store = Store(tmp_path)
    for i in range(100):
        store.put(key(i), row(i))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before
    check(tmp_path, range(10))
    store.publish()  # there is room again
    check(tmp_path, range(100))


MANIFEST = Manifest({"name": "topk", "k": 4}, {"weights": "a", "name": "t"}, [1], 50, None)


def test_a_manifest_is_of_whoever_comes_first(tmp_path):
    assert read_manifest(tmp_path) is None
    others = [Manifest({"name": "topk", "k": k}, {}, [1], 50, None) for k in range(8)]
    won: list[Manifest] = []
    start = threading.Barrier(len(others))

    def create(mine: Manifest) -> None:
        start.wait(LIMIT_S)
        won.append(mine.write(tmp_path))

    threads = [threading.Thread(target=create, args=[mine]) for mine in others]
    for thread in threads:
        thread.start()
    join(*threads)
    assert len(won) == 8 and all(manifest == won[0] for manifest in won)
    assert won[0] in others and read_manifest(tmp_path) == won[0]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_differs_is_named(tmp_path):
    MANIFEST.write(tmp_path)
    MANIFEST.refuse_other(tmp_path, {"name": "topk"}, {"weights": "a", "name": "a copy elsewhere"})
    with pytest.raises(
        UserError, match=r"codec\.k: 4 there, 5 asked for; teacher\.weights: a there"
    ):
        MANIFEST.refuse_other(tmp_path, {"k": 5}, {"weights": "b"})
    with pytest.raises(UserError, match=r"codec\.name: topk there, hidden asked for"):
        MANIFEST.refuse_other(tmp_path, {"name": "hidden"}, {})
    with pytest.raises(UserError, match=r"teacher\.dtype: absent there"):
        MANIFEST.refuse_other(tmp_path, {}, {"dtype": "float32"})


@pytest.mark.parametrize("edit", ['"k": 4', '"format": 1', '"vocab_size": 50', "{"])
def test_an_edited_manifest_is_refused(tmp_path, edit):
    MANIFEST.write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(edit, edit.replace("4", "5").replace("{", "")))
    if edit == '"format": 1':
        path.write_text(path.read_text().replace(edit, '"format": 2'))
    if edit == '"vocab_size": 50':
        path.write_text(path.read_text().replace(edit, '"vocab_size": 51'))
    with pytest.raises(UserError, match="is damaged or was edited"):
        read_manifest(tmp_path)


def test_another_format_is_told_apart_from_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("kd.teacher.manifest.FORMAT", 2)
    MANIFEST.write(tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == 2
    with pytest.raises(UserError, match="is of format 2, this version reads 1"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_head_is_kept_and_checked(tmp_path, dtype):
    weight_VD, bias_V = torch.randn(9, 4, dtype=dtype), torch.randn(9, dtype=dtype)
    for bias in (None, bias_V):
        name = write_head(tmp_path, weight_VD, bias)
        assert write_head(tmp_path, weight_VD, bias) == name
        head = read_head(tmp_path, name)
        assert torch.equal(head.weight_VD, weight_VD)
        assert (head.bias_V is None) if bias is None else torch.equal(head.bias_V, bias)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is missing or damaged"):
        read_head(tmp_path, name)
