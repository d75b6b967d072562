"""`teacher=cached` and `kd.cache`: the same training, with the teacher asked once or never."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from kd import cache as kd_cache
from kd import run as kd_run
from kd.model import PretrainedModel
from kd.teacher import store
from kd.teacher.store import segment_paths
from kd.teacher.weights import folder_digest, weights_digest
from kd.types import UserError
from tests.conftest import FAST, metrics
from tests.processes import join

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm")
LOADED = "the teacher that fills"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What tests share is made by the first that needs it, and copied from here."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def teacher(train, made, tmp_path) -> Path:
    """A copy of a teacher that has learnt a little."""
    if not (made / "teacher").exists():
        options = ["student=digits_small", "train.max_steps=10", "optim.lr=0.01", "doctor=never"]
        (train("digits_teacher", "teacher", *options) / "export").rename(made / "teacher")
    return Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))


@pytest.fixture
def cached(train, teacher, tmp_path) -> Callable[..., Path]:
    """Train by a cache of the teacher in `tmp_path/cache`; a name and what differs."""

    def run(name: str, *overrides: str) -> Path:
        return train("digits_kd", name, *options(teacher, tmp_path), *overrides)

    return run


def options(teacher: Path, folder: Path) -> list[str]:
    return [
        *("teacher=cached", f"teacher.source.name={teacher}", "teacher.source.dtype=float32"),
        *(f"teacher.folder={folder / 'cache'}", "teacher.dtype=float32", "doctor=never"),
        *("validation.generate=false", "data.num_images=40"),
    ]


@pytest.fixture
def local(train, teacher) -> Callable[..., Path]:
    """Train by the teacher itself."""

    def run(name: str, *overrides: str) -> Path:
        base = [f"teacher.name={teacher}", "teacher.dtype=float32", "doctor=never"]
        more = ["validation.generate=false", "data.num_images=40"]
        return train("digits_kd", name, *base, *more, *overrides)

    return run


@pytest.fixture
def filled(cached, made, tmp_path) -> Path:
    """A run that has filled `tmp_path/cache`, which was empty, and has validated."""
    if not (made / "filled").exists():
        cached("filled", "train.val_every=3").rename(made / "filled")
        shutil.copytree(tmp_path / "cache", made / "cache")
    elif not (tmp_path / "cache").exists():
        shutil.copytree(made / "cache", tmp_path / "cache")
    return made / "filled"


@pytest.fixture
def taught(local, made) -> Path:
    """The same run by the teacher itself."""
    if not (made / "taught").exists():
        local("taught", "train.val_every=3").rename(made / "taught")
    return made / "taught"


def same(run: Path, other: Path, keys: tuple[str, ...] = LOSSES, **tolerance: float) -> bool:
    assert all(metrics(other, key) for key in keys)
    return all(
        metrics(run, key) == pytest.approx(metrics(other, key), **(tolerance or {"abs": 0}))
        for key in keys
    )


def remove_weights(teacher: Path) -> None:
    """What is left is enough for its processor, and not for the model."""
    for path in teacher.glob("*.safetensors"):
        path.unlink()


# ---- training ----------------------------------------------------------------------------------


def test_hidden_states_train_as_the_teacher_itself(filled, taught, cached, teacher):
    assert same(filled, taught, (*LOSSES, "val/loss", "val/kd"), rel=1e-5)
    assert set(metrics(filled, "cache/hit_rate").values()) == {0}
    # 6 steps of 4 rows; 10 rows to validate on, from step 4 on.
    assert list(metrics(filled, "cache/rows").values()) == [4, 8, 12, 26, 30, 34]

    remove_weights(teacher)
    reading = cached("reading", "train.val_every=3", "teacher.require_full=true")
    assert same(reading, filled, (*LOSSES, "val/loss", "val/kd"))
    assert set(metrics(reading, "cache/hit_rate").values()) == {1}
    assert set(metrics(reading, "cache/rows").values()) == {34}


def test_half_precision_is_what_is_trained_on_from_the_first_step(cached, taught):
    filling = cached("filling", "teacher.dtype=bfloat16")
    assert same(cached("reading", "teacher.dtype=bfloat16"), filling)
    assert same(filling, taught, rel=1e-2)
    assert not same(filling, taught, ("train/kd",), rel=1e-7)


def test_all_of_the_top_k_is_close_to_the_teacher_itself(cached, local):
    """The digits have 420 tokens: 419 of them and the rest are the whole distribution."""
    more = ["teacher.codec=topk", "teacher.k=419", "loss.temperature=2"]
    filling = cached("filling", *more)
    assert same(cached("reading", *more), filling)
    assert same(filling, local("local", more[-1]), rel=1e-2)
    some = cached("some", *more[:1], "teacher.k=16", more[-1], "teacher.folder=${run.dir}/some")
    few, whole = (metrics(run, "train/kd") for run in (some, filling))
    assert all(few[step] < 1.01 * whole[step] for step in whole)  # lumped together: less


def test_the_second_epoch_finds_all(cached, caplog):
    """16 questions about 4 images: three epochs in 12 steps."""
    with caplog.at_level("INFO"):
        run = cached("epochs", "data.num_images=4", "train.max_steps=12")
    hits = metrics(run, "cache/hit_rate")
    rows = metrics(run, "cache/rows")
    epoch = next(step for step in hits if hits[step] == 1)
    assert epoch <= 6 and all(hits[step] == 1 for step in range(epoch, 13))
    assert rows[12] == rows[epoch]
    assert caplog.text.count(LOADED) == 1


def test_another_tokenizer(cached, local, teacher):
    """The student's tokens are others: hidden states serve the losses on groups, too."""
    aligned = ["student=digits_qwen3_vl", "loss=gold"]
    filling = cached("filling", *aligned)
    assert same(filling, local("local", *aligned), rel=1e-5)
    remove_weights(teacher)
    assert same(cached("reading", *aligned), filling)


def test_resume_equals_never_having_stopped(cached, tmp_path):
    more = ["train.save_every=2", "checkpoint.keep_last=9", "train.grad_accum=2"]
    stopped = cached("stopped", *more)
    whole = Path(shutil.copytree(stopped, tmp_path / "whole"))
    for step in (4, 6):
        shutil.rmtree(stopped / "checkpoints" / f"step_{step:06d}")
    for path in segment_paths(tmp_path / "cache" / "segments"):
        path.unlink()  # as if killed before it was published
    assert same(cached("stopped", *more), whole)
    assert max(metrics(stopped, "train/loss")) == 6
    assert set(metrics(stopped, "cache/hit_rate").values()) == {0}


def in_child(module: str, arguments: list[str], settings: dict[str, Any]) -> None:
    """`python -m module`, with settings that the command line does not have."""
    os.environ.update(settings.get("environ", {}))
    store.SEGMENT_BYTES = settings.get("segment_bytes", store.SEGMENT_BYTES)
    if "file_bytes" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_bytes"],) * 2)
    sys.argv = [module, "--config-name", "digits_kd", *arguments]
    with open(settings["stderr"], "w") as sys.stderr:
        {"kd.run": kd_run, "kd.cache": kd_cache}[module].main()


def start(module: str, arguments: list[str], **settings: Any) -> BaseProcess:
    """A process of its own, with its messages in the file `stderr`.

    Forked from one that has imported everything and done nothing: a fork of this one, which has
    threads, may never get a lock.
    """
    context = multiprocessing.get_context("forkserver")
    lazily = "transformers.models.qwen3_5.modeling_qwen3_5"  # else by every process anew
    context.set_forkserver_preload(["kd.run", "kd.cache", lazily])
    process = context.Process(target=in_child, args=(module, arguments, settings))
    process.start()
    return process


def on_ranks(module: str, folder: Path, *arguments: str) -> None:
    """Two of them, as a launcher starts them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [folder / f"rank_{rank}.log" for rank in (0, 1)]
    processes = [
        start(
            module,
            list(arguments),
            environ={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    join(*processes)
    codes = [process.exitcode for process in processes]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]


def test_two_ranks_equal_one(filled, cached, teacher, tmp_path):
    shards = f"teacher.folder={tmp_path / 'shards'}"
    base = [*FAST, *options(teacher, tmp_path), f"run.dir={tmp_path / 'runs'}", "logger=jsonl"]
    base += ["train.micro_batch_size=2", "train.val_every=3"]
    on_ranks("kd.run", tmp_path, *base, "run.name=two", shards)
    two = tmp_path / "runs" / "two"
    assert same(two, filled, (*LOSSES, "val/kd", "cache/hit_rate", "cache/rows"), rel=1e-5)
    # Each has written what it has read; one rank finds all of it, and two find what one has.
    assert len(segment_paths(tmp_path / "shards" / "segments")) == 2
    remove_weights(teacher)
    again = cached("again", shards, "train.val_every=3")
    on_ranks("kd.run", tmp_path, *base, "run.name=again_on_two")
    for run in (again, tmp_path / "runs" / "again_on_two"):
        assert same(run, two, (*LOSSES, "val/kd"), rel=1e-5)
        assert set(metrics(run, "cache/hit_rate").values()) == {1}


# ---- refusals ----------------------------------------------------------------------------------


def refusal(run: Callable[..., Path], capsys, *overrides: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        run("refused", *overrides)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_other_teachers_and_codecs_are_refused(filled, cached, teacher, capsys):
    error = refusal(cached, capsys, "teacher.dtype=bfloat16")
    assert "codec.dtype: float32 there, bfloat16 asked for" in error
    error = refusal(cached, capsys, "teacher.codec=topk")
    assert "codec.name: hidden there, topk asked for" in error
    error = refusal(cached, capsys, "teacher.source.dtype=bfloat16")
    assert "teacher.dtype: float32 there, bfloat16 asked for" in error
    error = refusal(cached, capsys, "teacher.source.processor.max_pixels=1024")
    assert "teacher.rendering" in error

    copy = shutil.copytree(teacher, teacher.parent / "copy")  # the same teacher elsewhere
    copied = cached("copied", f"teacher.source.name={copy}", "train.max_steps=2")
    assert set(metrics(copied, "cache/hit_rate").values()) == {1}
    weights = load_file(copy / "model.safetensors")
    weights["model.language_model.norm.weight"] *= 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert folder_digest(copy) != folder_digest(teacher)
    error = refusal(cached, capsys, f"teacher.source.name={copy}")
    assert "teacher.weights" in error and "Choose another folder" in error


def test_another_top_k_is_refused(cached, capsys):
    topk = ["teacher.codec=topk", "teacher.k=20"]
    cached("filling", *topk, "train.max_steps=1", "optim.warmup_steps=1")
    assert "codec.k: 20 there, 21 asked for" in refusal(cached, capsys, topk[0], "teacher.k=21")
    error = refusal(cached, capsys, *topk, "loss.temperature=2")
    assert "codec.temperature: 1.0 there, 2.0 asked for" in error


def test_another_tokenizer_is_refused(filled, cached, train, capsys):
    short = ["train.max_steps=1", "optim.warmup_steps=0", "doctor=never", "student=digits_small"]
    other = train("digits_teacher", "other", *short, "student.vocab_size=300") / "export"
    error = refusal(cached, capsys, f"teacher.source.name={other}", "student.vocab_size=300")
    assert "teacher.tokenizer" in error


def test_a_full_cache_can_be_required(filled, cached, capsys):
    error = refusal(cached, capsys, "teacher.require_full=true", "train.max_steps=9")
    assert "lacks the response of row digits" in error and "python -m kd.cache" in error


def test_a_damaged_row_ends_the_run_by_its_file(filled, cached, tmp_path, capsys):
    (path,) = segment_paths(tmp_path / "cache" / "segments")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    error = refusal(cached, capsys, "train.val_every=3")
    assert re.search(f"{path} is damaged .row [0-9]+ has changed", error)
    assert "Remove this file: its rows are filled again" in error
    path.unlink()
    assert same(cached("refused", "train.val_every=3"), filled)


def test_what_cannot_be(cached, train, capsys):
    for source in (["=none"], ["=cached", "teacher.source.source.name=x"]):
        options = ["teacher=cached", f"teacher@teacher.source{source[0]}", *source[1:]]
        with pytest.raises(SystemExit) as exit_:
            train("digits_kd", "refused", *options)
        assert exit_.value.code == 2
        assert "teacher.source: choose one" in capsys.readouterr().err
    error = refusal(cached, capsys, "rollout=student", "kd_ratio=1")
    assert "needs responses that come again" in error
    assert "teacher.dtype=int8" in refusal(cached, capsys, "teacher.dtype=int8")
    assert "teacher.codec=logits" in refusal(cached, capsys, "teacher.codec=logits")
    assert "k=0" in refusal(cached, capsys, "teacher.k=0")
    error = refusal(cached, capsys, "teacher.source.alignment=bytes")
    assert "set teacher.alignment" in error
    error = refusal(cached, capsys, "teacher.codec=topk", "teacher.k=420")
    assert "top-k of 420" in error


# ---- kd.cache ----------------------------------------------------------------------------------


@pytest.fixture
def fill(monkeypatch, teacher, tmp_path) -> Callable[..., None]:
    """`python -m kd.cache` in this process."""

    def main(*args: str) -> None:
        argv = ["kd.cache", "--config-name", "digits_kd", *filling(teacher, tmp_path), *args]
        monkeypatch.setattr(sys, "argv", argv)
        GlobalHydra.instance().clear()
        kd_cache.main()

    return main


def filling(teacher: Path, folder: Path) -> list[str]:
    base = [*options(teacher, folder), "parallel.cpu_threads=1", "data.val_samples=10"]
    return [*base, "train.micro_batch_size=4"]


def report(printed: str) -> dict[str, str]:
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {name: value for name, value in cells if name}


@pytest.mark.parametrize("codec", ["hidden", "topk"])
def test_filled_ahead_of_time(fill, cached, teacher, codec, capsys, caplog):
    chosen = [f"teacher.codec={codec}", "data.num_images=20"]
    with caplog.at_level("INFO"):
        fill(*chosen)
        fill(*chosen)
    assert "holds 110 rows; 0.0 %" in caplog.text and "holds 110 rows; 100.0 %" in caplog.text
    assert caplog.text.count(LOADED) == 1
    capsys.readouterr()
    fill(*chosen, "--verify")
    found = report(capsys.readouterr().out)
    assert found["hit rate"] == "1.0000" and found["damaged"] == "0"
    assert found["rows of the data that are there"] == "110 of 110"
    assert found["bytes per token"] == {"hidden": "384", "topk": "163"}[codec]
    mean, tail = (found[f"KL(teacher || kept), {x}"] for x in ("mean", "99th percentile"))
    assert float(mean) < {"hidden": 1e-9, "topk": 1e-4}[codec] and float(tail) < 4e-4
    remove_weights(teacher)
    run = cached("reading", *chosen, "train.val_every=3", "train.max_steps=30")
    assert set(metrics(run, "cache/hit_rate").values()) == {1}


def test_verify_names_what_is_damaged(fill, tmp_path, capsys, caplog):
    with pytest.raises(SystemExit) as exit_:
        fill("--verify")
    assert exit_.value.code == 2 and "there is no cache in" in capsys.readouterr().err
    fill("data.num_images=8")
    (path,) = segment_paths(tmp_path / "cache" / "segments")
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(SystemExit) as exit_, caplog.at_level("INFO"):
        fill("data.num_images=8", "--verify")
    assert exit_.value.code == 1
    assert report(capsys.readouterr().out)["damaged"] == "1"
    assert f"{path} is damaged" in caplog.text
    path.unlink()
    fill("data.num_images=8")
    fill("data.num_images=8", "--verify")
    assert report(capsys.readouterr().out)["hit rate"] == "1.0000"


def test_traceback_on_request(fill):
    with pytest.raises(UserError, match="there is no cache in"):
        fill("--verify", "traceback=true")


def test_killed_and_started_again(fill, teacher, tmp_path, caplog):
    """It loses what was not published yet."""
    arguments = [*filling(teacher, tmp_path), "data.num_images=40"]
    process = start("kd.cache", arguments, segment_bytes=20_000, stderr=tmp_path / "log")
    while len(segment_paths(tmp_path / "cache" / "segments")) < 3:
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.001)
    process.kill()
    join(process)
    assert process.exitcode == -signal.SIGKILL
    assert not list(store.damage(segment_paths(tmp_path / "cache" / "segments")))
    with caplog.at_level("INFO"):
        fill()
        fill()
    first, second = (float(x.split(" %")[0]) for x in caplog.text.split("rows; ")[1:])
    assert 0 < first < second == 100


def test_filled_by_two_ranks_and_another_at_the_same_time(fill, teacher, tmp_path, capsys):
    arguments = [*filling(teacher, tmp_path), "data.num_images=20"]
    other = start("kd.cache", arguments, segment_bytes=20_000, stderr=tmp_path / "log")
    on_ranks("kd.cache", tmp_path, *arguments)
    join(other)
    assert other.exitcode == 0, (tmp_path / "log").read_text()
    fill("data.num_images=20", "--verify")
    found = report(capsys.readouterr().out)
    assert found["rows of the data that are there"] == "110 of 110"
    assert found["rows in all"] == "110" and found["damaged"] == "0"


def test_a_disk_that_is_full(fill, teacher, tmp_path, capsys):
    """As a limit on the size of files, which the head keeps below."""
    arguments = [*filling(teacher, tmp_path), "data.num_images=20"]
    process = start("kd.cache", arguments, file_bytes=200_000, stderr=tmp_path / "log")
    join(process)
    assert process.exitcode == 2
    error = (tmp_path / "log").read_text()
    assert "cannot write the cache" in error and "File too large" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "cache" / "segments").iterdir())
    fill("data.num_images=20")
    fill("data.num_images=20", "--verify")
    assert report(capsys.readouterr().out)["hit rate"] == "1.0000"


def test_the_digest_of_weights(tmp_path):
    tensors = {f"layer.{i}": torch.randn(300, 200) for i in range(20)}

    def digest_of(name: str, changed: dict[str, torch.Tensor]) -> str | None:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors | changed, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
        return folder_digest(folder)

    whole = digest_of("whole", {})
    assert digest_of("copy", {}) == whole
    assert digest_of("trained", {"layer.7": tensors["layer.7"] * 1.0001}) != whole
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "y"}))
    assert folder_digest(tmp_path / "copy") != whole
    assert folder_digest(tmp_path) is None


def test_another_commit_of_a_hub_model_is_another_teacher(tmp_path, monkeypatch):
    """A hub's model as its cache on disk has it: a revision is a name that may move."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, old, new = tmp_path / "models--org--teacher", "a" * 40, "b" * 40
    for commit in (old, new):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text('{"model_type": "qwen3_5"}')
    (model / "refs").mkdir()

    def digest(commit_of_main: str, revision: str | None = None) -> str | None:
        (model / "refs" / "main").write_text(commit_of_main)
        return weights_digest(PretrainedModel(name="org/teacher", revision=revision))

    assert digest(old) == f"org/teacher@{old}"
    assert digest(new) == digest(old, revision=new) == f"org/teacher@{new}"
    with pytest.raises(OSError, match="find them in the cached files"):
        digest(old, revision="v3")
