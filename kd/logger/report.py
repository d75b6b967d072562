"""`report.html`: one run on one page, in one file. `python -m kd.logger.report runs/<name>`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from kd.logger.charts import Chart, line_chart
from kd.logger.files import write_atomic
from kd.logger.images import PNG_URI
from kd.logger.read import (
    Points,
    read_latest_rollouts,
    read_latest_samples,
    read_metrics,
    read_status,
    summarize,
)
from kd.logger.response import heated, highest, scale, spread
from kd.logger.text import format_duration, format_number
from kd.types import UserError

CHARTS = {
    "Training loss": ("train/loss", "train/ce", "train/kd"),
    "Training loss by data set": ("train/loss_*",),
    "Validation loss": ("val/loss", "val/ce", "val/kd"),
    "Validation loss by data set": ("val/loss_*",),
    "Validation accuracy": ("val/accuracy*",),
    "Accept length": ("val/accept_length*", "train/accept_length"),
    "Accepted by position in the block": tuple(f"val/accept_{k}" for k in range(1, 32)),
    "Gradient norm": ("train/grad_norm",),
    "Learning rate": ("train/lr",),
    "Tokens per second": ("train/tokens_per_s",),
    "Rollout length": ("rollout/length_mean",),
    "Rollouts: truncated, ended, repetition": (
        "rollout/truncated",
        "rollout/eos",
        "rollout/repetition",
    ),
    "Staleness": ("rollout/staleness",),
    "Rollout tokens per second": ("rollout/tokens_per_s",),
}
SHARES = {
    "Validation accuracy",
    "Accepted by position in the block",
    "Rollouts: truncated, ended, repetition",
}
"""The charts of values that are parts of a whole."""
SETTINGS_FILES = ("overrides.yaml", "config.yaml")


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from what is there so far and return its path.

    The file needs nothing else: no network, no script. It is replaced atomically.
    Raises UserError if there is no such directory.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no directory: give the directory of a run, e.g. runs/<name>")
    series = read_metrics(run_dir)
    samples = [with_own_images_only(row) for row in read_latest_samples(run_dir)]
    rollouts = [with_own_images_only(row) for row in read_latest_rollouts(run_dir)]
    full_heat = scale(row["divergence"] for row in rollouts)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "duration": format_duration}
    page = environment.get_template("report.html.jinja").render(
        name=run_dir.resolve().name,
        status=read_status(run_dir),
        charts=charts(series),
        summaries=[summarize(name, points) for name, points in sorted(series.items())],
        nonfinite=nonfinite(series),
        samples=samples,
        rollouts=[with_heat(row, full_heat) for row in rollouts],
        full_heat=full_heat,
        settings=read_settings(run_dir),
    )
    path = run_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def charts(series: dict[str, Points]) -> list[Chart]:
    """Every chart that has something to show."""
    chosen = {title: select(series, patterns) for title, patterns in CHARTS.items()}
    return [
        line_chart(title, lines, share=title in SHARES) for title, lines in chosen.items() if lines
    ]


def select(series: dict[str, Points], patterns: tuple[str, ...]) -> dict[str, Points]:
    """The metrics named by `patterns`, in that order; a trailing * stands for any ending."""
    return {
        name: series[name]
        for pattern in patterns
        for name in sorted(series)
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
    }


def nonfinite(series: dict[str, Points]) -> dict[str, list[int]]:
    """Metric -> the steps at which it was NaN or infinite."""
    steps = {
        name: [step for step, value in points if not math.isfinite(value)]
        for name, points in series.items()
    }
    return {name: found for name, found in steps.items() if found}


def with_own_images_only(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample without images that a browser would have to fetch from elsewhere."""
    images = [uri for uri in sample.get("images", []) if str(uri).startswith(PNG_URI)]
    return {**sample, "images": images}


def with_heat(rollout: dict[str, Any], full_heat: float) -> dict[str, Any]:
    """The rollout with its tokens as they are shown, and what its divergences come to."""
    tokens = heated(rollout["tokens"], rollout["divergence"], full_heat)
    found = {"tokens": tokens, "highest": highest(tokens), "spread": spread(rollout["divergence"])}
    return rollout | found


def read_settings(run_dir: Path) -> dict[str, str]:
    """File name -> text of the settings files that the run has."""
    return {
        name: (run_dir / name).read_text(encoding="utf-8", errors="replace").strip()
        for name in SETTINGS_FILES
        if (run_dir / name).exists()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write report.html of one or more runs.")
    parser.add_argument("run_dir", type=Path, nargs="+", help="directory of a run, runs/<name>")
    try:
        for run_dir in parser.parse_args().run_dir:
            print(write_report(run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
