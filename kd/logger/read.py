"""Reading a run directory back, also one that is empty, half-written or still growing."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.logger.files import iter_records
from kd.logger.jsonl import METRICS_FILE, ROLLOUT, SAMPLES_FILE, VALIDATION

log = logging.getLogger(__name__)

Points = list[tuple[int, float]]
"""(step, value), in the order they were written."""


@dataclass
class Status:
    """How far a run is."""

    status: str
    """running, finished, stopped or failed."""
    step: int
    wall_s: float
    device: str = "cpu"
    """What a rank computes on: cpu or cuda."""
    device_s: float | None = None
    """Seconds of all ranks together; None: not known."""


@dataclass
class Summary:
    """What a metric came to. `best` is None for metrics with no better side (a rate, say)."""

    name: str
    last: float
    last_step: int
    best: float | None
    best_step: int | None


def read_metrics(run_dir: Path) -> dict[str, Points]:
    """Every metric of `metrics.jsonl`; NaN and infinities are themselves again."""
    series: dict[str, Points] = {}
    for _, record in iter_records(Path(run_dir) / METRICS_FILE):
        nonfinite = record.pop("nonfinite", {})
        step = record.pop("step")
        for name, value in record.items():
            series.setdefault(name, []).append((step, float(nonfinite.get(name, value))))
    return series


def read_latest_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the last validation in `samples.jsonl`."""
    return _latest(run_dir, VALIDATION)


def read_latest_rollouts(run_dir: Path) -> list[dict[str, Any]]:
    """The rollouts of the last step that recorded any; NaN and infinities as in `read_metrics`."""
    rows = _latest(run_dir, ROLLOUT)
    for row in rows:
        nonfinite = row.pop("nonfinite", {})
        values = enumerate(row["divergence"])
        row["divergence"] = [float(nonfinite.get(str(i), x)) for i, x in values]
    return rows


def _latest(run_dir: Path, kind_of_line: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for _, record in iter_records(Path(run_dir) / SAMPLES_FILE):
        if record.get("type", VALIDATION) != kind_of_line:
            continue
        if rows and rows[0]["step"] != record["step"]:
            rows.clear()
        rows.append(record)
    return rows


def read_status(run_dir: Path) -> Status | None:
    """`status.json`; None if there is none, or if it is broken (with a warning)."""
    path = Path(run_dir) / "status.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        device_s = content.get("device_s")
        return Status(
            str(content["status"]),
            int(content["step"]),
            float(content["wall_s"]),
            str(content.get("device", "cpu")),
            None if device_s is None else float(device_s),
        )
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is broken (%r) and is left out", path, error)
        return None


def summarize(name: str, points: Points) -> Summary:
    """Last and best value; the best is the highest accuracy, or the lowest loss."""
    finite = [(value, step) for step, value in points if math.isfinite(value)]
    best, best_step = None, None
    if finite and "accuracy" in name:
        best, best_step = max(finite, key=lambda x: x[0])
    elif finite and name.rpartition("/")[2] in ("loss", "ce", "kd"):
        best, best_step = min(finite, key=lambda x: x[0])
    return Summary(name, points[-1][1], points[-1][0], best, best_step)
