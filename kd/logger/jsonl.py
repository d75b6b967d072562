"""`metrics.jsonl` and `samples.jsonl`: the record of a run that everything else is made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image

from kd.logger.base import RolloutRecord, SampleRecord
from kd.logger.files import append_lines, drop_after
from kd.logger.images import png_data_uri, thumbnail

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
VALIDATION, ROLLOUT = "validation", "rollout"
"""What a line of `samples.jsonl` is, its `type`; one without is of a validation."""


class JsonlLogger:
    """Appends lines to the two files of `run_dir`; each line is on disk when the call returns."""

    def __init__(self, run_dir: Path, image_px: int) -> None:
        self.run_dir = Path(run_dir)
        self.image_px = image_px

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Remove what was written after `first_step`, so that every step is there once."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE):
            drop_after(self.run_dir / name, first_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line. Raises OSError naming the file."""
        append_lines(self.run_dir / METRICS_FILE, [metrics_record(step, metrics)])

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Append one line per row, images as small PNGs. Raises OSError naming the file."""
        records = [sample_record(step, row, self.image_px) for row in rows]
        append_lines(self.run_dir / SAMPLES_FILE, records)

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Append one line per row, images as small PNGs. Raises OSError naming the file."""
        records = [rollout_record(step, row, self.image_px) for row in rows]
        append_lines(self.run_dir / SAMPLES_FILE, records)

    def close(self, failed: bool = False) -> None:
        """Nothing is held open."""


def metrics_record(step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """One line. JSON has no NaN: such a value is null, and `nonfinite` names what it was."""
    record: dict[str, Any] = {"step": step}
    record |= {name: _finite(x) for name, x in metrics.items()}
    return record | _nonfinite(metrics)


def sample_record(step: int, row: SampleRecord, image_px: int) -> dict[str, Any]:
    """One line, with its images as data URIs of at most `image_px` on the longest side."""
    return {
        "step": step,
        "type": VALIDATION,
        "id": row.id,
        "kind": row.kind,
        "question": row.question,
        "answer": row.answer,
        "student": row.student,
        "teacher": row.teacher,
        "correct": row.correct,
        "images": _images(row.images, image_px),
    }


def rollout_record(step: int, row: RolloutRecord, image_px: int) -> dict[str, Any]:
    """One line, images as in `sample_record`; `nonfinite` is {index of the token: its value}."""
    record = {
        "step": step,
        "type": ROLLOUT,
        "id": row.id,
        "kind": row.kind,
        "question": row.question,
        "answer": row.answer,
        "policy": row.policy,
        "tokens": row.tokens,
        "divergence": [_finite(x) for x in row.divergence],
        "finished": row.finished,
        "staleness": row.staleness,
        "images": _images(row.images, image_px),
    }
    return record | _nonfinite({str(i): x for i, x in enumerate(row.divergence)})


def _images(images: list[Image.Image], image_px: int) -> list[str]:
    return [png_data_uri(thumbnail(image, image_px)) for image in images]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nonfinite(values: dict[str, float]) -> dict[str, dict[str, str]]:
    found = {name: str(x) for name, x in values.items() if not math.isfinite(x)}
    return {"nonfinite": found} if found else {}
