"""Real offline runs of the real client; nothing here reaches a network."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from kd.logger import WandbLoggerConfig
from kd.logger.wandb import WandbLogger
from kd.types import UserError
from tests.processes import completed, python

Record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]


def offline(run_dir: Path, **options) -> WandbLogger:
    return WandbLogger(run_dir, WandbLoggerConfig(mode="offline", **options))


def stored(run_dir: Path) -> list[list[Any]]:
    """The records of each offline run in a run directory, oldest first."""
    wandb.teardown()  # the service writes on after a run is finished
    paths = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    return [[Record.FromString(data) for data in chunks(path.read_bytes())] for path in paths]


def chunks(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: 32 KiB blocks of pieces (checksum, length, type, data)."""
    whole, first, _, last = 1, 2, 3, 4
    position, data = 7, b""
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, piece = struct.unpack_from("<IHB", content, position)
        data = (b"" if piece in (whole, first) else data) + content[position + 7 :][:length]
        if piece in (whole, last):
            yield data
        position += 7 + length


def history(records: list[Any]) -> list[dict]:
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.item} for r in rows
    ]


def test_offline_run_holds_config_metrics_and_samples(tmp_path, record):
    logger = offline(tmp_path / "run", project="digits", tags=["a"])
    logger.start({"kd_ratio": 0.25, "train": {"max_steps": 9}}, 9, 0)
    logger.log(3, {"train/loss": 0.5})
    pictures = [Image.new("RGB", (400, 100)), Image.new("L", (8, 8))]
    rows = [record(images=[], teacher=None), record(id="b", correct=True, images=pictures)]
    logger.samples(3, rows)
    logger.close()

    (records,) = stored(tmp_path / "run")
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    config = {i.key: json.loads(i.value_json) for i in run.config.update}
    assert config["kd_ratio"] == 0.25 and config["train"] == {"max_steps": 9}
    assert (run.project, run.display_name, list(run.tags)) == ("digits", "run", ["a"])
    first, second = history(records)
    assert (first["step"], first["train/loss"]) == (3, 0.5)
    assert second["val/samples._type"] == "table-file"
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]

    staged = [p.read_bytes() for p in (tmp_path / "wandb_data").rglob("*") if p.is_file()]
    table = staged_table(tmp_path)
    assert table["columns"] == [
        *("id", "kind", "image_1", "image_2"),
        *("question", "reference", "student", "teacher", "correct"),
    ]
    plain, pictured = table["data"]
    assert plain == ["row-1", "count", None, None, "How many?", "three", "four", None, False]
    assert [(c["_type"], c["width"], c["height"]) for c in pictured[2:4]] == [
        ("image-file", 192, 48),
        ("image-file", 8, 8),
    ]
    assert pictured[4:] == ["How many?", "three", "four", "three", True]
    assert sum(b.startswith(b"\x89PNG") for b in staged) >= 2


def test_rollouts_are_a_table_that_is_valid_json(tmp_path, rollout):
    logger = offline(tmp_path / "run")
    logger.start({}, 9, 0)
    broken = [0.5, math.nan, math.inf, 1.0]
    nothing = rollout(tokens=[], divergence=[], answer=None, policy="teacher", images=[])
    logger.rollouts(3, [rollout(), rollout(divergence=broken, finished=True), nothing])
    logger.close()

    (records,) = stored(tmp_path / "run")
    (row,) = history(records)
    assert (row["step"], row["rollout/samples._type"]) == (3, "table-file")
    table = staged_table(tmp_path)
    assert table["columns"] == [
        *("id", "kind", "image_1", "question", "reference", "policy", "response", "tokens"),
        *("divergence_mean", "divergence_highest", "divergence_nonfinite"),
        *("finished", "staleness"),
    ]
    whole, infinite, empty = table["data"]
    assert (whole[2]["width"], whole[2]["height"]) == (192, 48)
    response = ["How many?", "three", "student", "There are\n four", 4]
    assert whole[3:] == [*response, 0.6875, 2.0, 0, False, 3]
    assert infinite[3:] == [*response, 0.75, 1.0, 2, True, 3]
    assert empty[2:] == [None, "How many?", None, "teacher", "", 0, None, None, 0, False, 3]


def staged_table(tmp_path: Path) -> dict:
    """The one table that waits for its upload."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    staged = [p.read_bytes() for p in (tmp_path / "wandb_data").rglob("*") if p.is_file()]
    (table,) = {b for b in staged if b.startswith(b'{"_type": "table"')}
    return json.loads(table, parse_constant=refuse)


def test_resumed_run_is_the_same_run_and_may_log_a_step_again(tmp_path):
    for first_step, failed in ((0, True), (2, False)):
        logger = offline(tmp_path)
        logger.start({}, 4, first_step)
        for step in range(first_step + 1, 5):
            logger.log(step, {"train/loss": float(step)})
        logger.close(failed=failed)
    killed, resumed = stored(tmp_path)
    ids = {r.run.run_id for r in killed + resumed if r.WhichOneof("record_type") == "run"}
    assert ids == {(tmp_path / "wandb_run_id").read_text().strip()}
    assert [row["step"] for row in history(killed)] == [1, 2, 3, 4]
    assert [row["step"] for row in history(resumed)] == [3, 4]
    assert [r.exit.exit_code for r in killed if r.WhichOneof("record_type") == "exit"] == [1]


def test_server_away_is_said_and_recorded_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_X_DISABLE_VIEWER", "true")  # who am I: ten seconds
    logger = WandbLogger(tmp_path, WandbLoggerConfig(init_timeout_s=1))
    logger.start({}, 4, 0)
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    (records,) = stored(tmp_path)
    assert history(records)[0]["train/loss"] == 1.0
    (offline_dir,) = tmp_path.glob("wandb/offline-run-*")
    assert f"wandb sync {offline_dir}" in caplog.text
    assert "Training goes on" in caplog.text


def test_missing_credentials_end_the_run_at_its_start(tmp_path):
    logger = WandbLogger(tmp_path, WandbLoggerConfig())
    with pytest.raises(UserError, match=r"(?s)API key.*logger\.mode=offline"):
        logger.start({}, 4, 0)


def test_dead_service_is_said_once_and_training_goes_on(tmp_path):
    """In a process of its own: wandb's hook at the end of it complains of the dead service."""
    output = completed(*python("-c", DEAD_SERVICE, tmp_path))
    assert output.returncode == 0, output.tail()
    assert output.stdout == "went on\n"
    assert output.stderr.count("gets no more of this run") == 1
    assert str(tmp_path / "metrics.jsonl") in output.stderr


DEAD_SERVICE = """
import os, signal, sys
from pathlib import Path
from kd.logger import WandbLoggerConfig
from kd.logger.wandb import WandbLogger

def children():
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for task in tasks for pid in task.read_text().split()]
    return [p for p in pids if b"wandb-core" in Path(f"/proc/{p}/cmdline").read_bytes()]

logger = WandbLogger(Path(sys.argv[1]), WandbLoggerConfig(mode="offline"))
logger.start({}, 60, 0)
logger.log(1, {"train/loss": 1.0})
(service,) = children()
os.kill(service, signal.SIGKILL)
os.waitpid(service, 0)
for step in range(2, 50):  # the first may still fit the socket
    logger.log(step, {"train/loss": 1.0})
logger.samples(50, [])
logger.rollouts(50, [])
logger.close()
print("went on")
"""
