from __future__ import annotations

import base64
import io
import json
import logging
import math
from pathlib import Path

import pytest
from PIL import Image

from kd.logger.images import PNG_URI
from kd.logger.jsonl import JsonlLogger
from kd.logger.read import (
    read_latest_rollouts,
    read_latest_samples,
    read_metrics,
    read_status,
    summarize,
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def logged(run_dir: Path, last: int, first_step: int = 0) -> JsonlLogger:
    logger = JsonlLogger(run_dir, 192)
    logger.start({}, 100, first_step)
    for step in range(first_step + 1, last + 1):
        logger.log(step, {"train/loss": 1 / step})
    return logger


def test_line_is_on_disk_when_log_returns(tmp_path):
    logger = logged(tmp_path / "new" / "run", 0)
    logger.log(7, {"train/loss": 0.5, "train/num_targets": 12})
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert lines == '{"step": 7, "train/loss": 0.5, "train/num_targets": 12}\n'


def test_resumed_run_has_each_step_once(tmp_path):
    logged(tmp_path, last=9)
    logged(tmp_path, last=12, first_step=5)
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 13))


def test_kept_lines_keep_their_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,  "train/loss": 1.50}\n{"step": 2}\n')
    logged(tmp_path, last=1, first_step=1)
    assert path.read_bytes() == b'{"step":1,  "train/loss": 1.50}\n'


def test_validation_before_the_first_step_is_not_doubled(tmp_path):
    for _ in range(2):
        logged(tmp_path, last=0).log(0, {"val/loss": 2.0})
    assert steps(tmp_path / "metrics.jsonl") == [0]


def test_torn_last_line_is_repaired(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    logged(tmp_path, last=3)
    path.write_bytes(path.read_bytes()[:-9])
    logged(tmp_path, last=4, first_step=3)
    assert steps(path) == [1, 2, 4]
    assert not caplog.records
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged(tmp_path, last=3)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    logged(tmp_path, last=4, first_step=3)
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("junk", [b"\x00\x00\n", b"{\n", b"[1]\n", b"\xff\n", b'{"step": "x"}\n'])
def test_broken_line_in_the_middle_is_named(tmp_path, caplog, junk):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + junk + b'{"step": 2}\n')
    logged(tmp_path, last=3, first_step=2)
    assert steps(path) == [1, 2, 3]
    assert f"{path} line 2 is broken" in caplog.text


def test_removed_lines_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    logged(tmp_path, last=9)
    logged(tmp_path, last=0, first_step=5)
    assert "4 lines after step 5 removed" in caplog.text


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    logger = logged(tmp_path, 0)
    logger.log(1, {"train/loss": math.nan, "train/kd": -math.inf, "train/ce": 1.0})

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["train/loss"] is None and line["train/ce"] == 1.0
    assert line["nonfinite"] == {"train/loss": "nan", "train/kd": "-inf"}
    series = read_metrics(tmp_path)
    assert math.isnan(series["train/loss"][0][1])
    assert series["train/kd"] == [(1, -math.inf)]


def test_full_disk_names_the_file(tmp_path):
    logger = logged(tmp_path, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        logger.log(1, {"train/loss": 1.0})


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA"])
def test_sample_image_is_a_small_png(tmp_path, record, mode):
    image = Image.new("RGB", (400, 100), "red").convert(mode)
    logged(tmp_path, 0).samples(3, [record(images=[image])])
    (uri,) = json.loads((tmp_path / "samples.jsonl").read_text())["images"]
    stored = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(PNG_URI))))
    assert (stored.format, stored.size) == ("PNG", (192, 48))
    assert image.size == (400, 100) and image.mode == mode


def test_small_image_is_not_enlarged(tmp_path, record):
    logged(tmp_path, 0).samples(3, [record(images=[Image.new("L", (8, 8))])])
    (uri,) = read_latest_samples(tmp_path)[0]["images"]
    assert Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(PNG_URI)))).size == (8, 8)


def test_samples_of_the_last_validation_are_read(tmp_path, record):
    logger = logged(tmp_path, 0)
    logger.samples(5, [record(id="a"), record(id="b")])
    logger.samples(10, [record(id="a", correct=True), record(id="ü", teacher=None)])
    rows = read_latest_samples(tmp_path)
    assert [(r["step"], r["id"], r["correct"]) for r in rows] == [(10, "a", True), (10, "ü", False)]
    assert rows[1]["teacher"] is None


def test_samples_after_the_checkpoint_are_removed(tmp_path, record):
    logger = logged(tmp_path, 0)
    for step in (5, 10):
        logger.samples(step, [record(), record()])
    logged(tmp_path, last=0, first_step=7)
    assert steps(tmp_path / "samples.jsonl") == [5, 5]


def test_rollout_is_written_and_read_back(tmp_path, rollout):
    tokens = ["<|im_start|>", "\n", " naïve", "\ufffd", ""]
    row = rollout(tokens=tokens, divergence=[0.1, 0.0, 1e-9, 2.5, 1.0], answer=None)
    logged(tmp_path, 0).rollouts(4, [row, rollout(finished=True, policy="dataset", staleness=0)])
    first, second = read_latest_rollouts(tmp_path)
    assert first["tokens"] == tokens
    assert first["divergence"] == [0.1, 0.0, 1e-9, 2.5, 1.0]
    assert (first["step"], first["policy"], first["staleness"]) == (4, "student", 3)
    assert first["answer"] is None and first["finished"] is False
    assert (second["policy"], second["finished"]) == ("dataset", True)
    (uri,) = first["images"]
    assert Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(PNG_URI)))).size == (192, 48)


def test_divergence_that_is_not_finite_is_valid_json_and_comes_back(tmp_path, rollout):
    divergence = [math.nan, 0.5, math.inf, -math.inf]
    logged(tmp_path, 0).rollouts(4, [rollout(divergence=divergence)])
    line = json.loads((tmp_path / "samples.jsonl").read_text(), parse_constant=refuse)
    assert line["divergence"] == [None, 0.5, None, None]
    assert line["nonfinite"] == {"0": "nan", "2": "inf", "3": "-inf"}
    (row,) = read_latest_rollouts(tmp_path)
    assert math.isnan(row["divergence"][0])
    assert row["divergence"][1:] == [0.5, math.inf, -math.inf]


def test_each_token_has_a_divergence(rollout):
    with pytest.raises(AssertionError, match="one divergence per token"):
        rollout(divergence=[0.5])


def test_rollouts_and_validation_rows_are_read_apart(tmp_path, record, rollout):
    logger = logged(tmp_path, 0)
    logger.samples(5, [record(id="old"), record(id="old")])
    logger.rollouts(6, [rollout(id="r6")])
    logger.samples(10, [record(id="v10")])
    logger.rollouts(10, [rollout(id="r10"), rollout(id="r10b")])
    logger.samples(10, [record(id="v10b")])
    assert [row["id"] for row in read_latest_samples(tmp_path)] == ["v10", "v10b"]
    assert [row["id"] for row in read_latest_rollouts(tmp_path)] == ["r10", "r10b"]
    logger.rollouts(12, [rollout(id="r12")])
    assert [row["id"] for row in read_latest_samples(tmp_path)] == ["v10", "v10b"]
    assert [row["id"] for row in read_latest_rollouts(tmp_path)] == ["r12"]


def test_line_without_type_is_of_a_validation(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 3, "id": "a", "correct": true}\n')
    assert [row["id"] for row in read_latest_samples(tmp_path)] == ["a"]
    assert read_latest_rollouts(tmp_path) == []


def test_rollouts_after_the_checkpoint_are_removed(tmp_path, record, rollout):
    logger = logged(tmp_path, 0)
    for step in (3, 6, 9):
        logger.rollouts(step, [rollout(id=f"r{step}")])
        logger.samples(step, [record(id=f"v{step}")])
    logged(tmp_path, last=0, first_step=6)
    assert steps(tmp_path / "samples.jsonl") == [3, 3, 6, 6]
    assert [row["id"] for row in read_latest_rollouts(tmp_path)] == ["r6"]
    assert [row["id"] for row in read_latest_samples(tmp_path)] == ["v6"]


def test_status_that_is_broken_is_named(tmp_path, caplog):
    assert read_status(tmp_path) is None and not caplog.records
    (tmp_path / "status.json").write_text('{"status": "run')
    assert read_status(tmp_path) is None
    assert "status.json is broken" in caplog.text


def test_best_is_the_highest_accuracy_and_the_lowest_loss():
    points = [(1, 0.5), (2, math.nan), (3, 0.2), (4, 0.3)]
    assert (summarize("val/accuracy_count", points).best_step) == 1
    assert (summarize("val/loss", points).best_step) == 3
    assert summarize("train/tokens_per_s", points).best is None
    assert summarize("val/loss", points).last == 0.3
    assert summarize("val/loss", [(1, math.inf)]).best is None
