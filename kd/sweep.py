"""Compare the runs below a directory: `python -m kd.sweep runs/<name>_sweep [--plot FILE]`.

`SweepSummary` is a Hydra callback that prints the same table when a multirun ends.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.logger.charts import plot_runs
from kd.logger.read import Points, Status, read_metrics, read_status, summarize
from kd.logger.text import format_duration, format_number
from kd.types import UserError

METRICS = ("val/accuracy", "val/loss", "train/loss")
RUN_FILES = {"config.yaml", "status.json", "metrics.jsonl"}


@dataclass
class Run:
    """What is compared."""

    name: str
    status: Status | None
    overrides: dict[str, str]
    series: dict[str, Points]


def read_runs(sweep_dir: Path) -> list[Run]:
    """All runs below `sweep_dir`, by name. Raises UserError if there are none."""
    found = []
    for folder, subfolders, files in os.walk(sweep_dir):
        if RUN_FILES & set(files):
            subfolders.clear()  # wandb keeps a config.yaml of its own inside a run
            found.append(Path(folder))
    if not found:
        raise UserError(f"no runs below {sweep_dir}: give a directory that run directories lie in")
    return [
        Run(str(p.relative_to(sweep_dir)), read_status(p), read_overrides(p), read_metrics(p))
        for p in sorted(found)
    ]


def read_overrides(run_dir: Path) -> dict[str, str]:
    """Key -> value of `overrides.yaml`; empty if there is none."""
    path = run_dir / "overrides.yaml"
    lines = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else []
    return {key: value for key, _, value in (str(x).partition("=") for x in lines or [])}


def differing(runs: list[Run]) -> list[str]:
    """The keys overridden differently among those `runs` that have overrides."""
    choices = [run.overrides for run in runs if run.overrides]
    keys = dict.fromkeys(key for overrides in choices for key in overrides)
    values = {key: {overrides.get(key) for overrides in choices} for key in keys}
    return [key for key in keys if len(values[key]) > 1 and key not in ("run.name", "run.dir")]


def summary_table(runs: list[Run], ended: bool) -> Table:
    """One row per run; `ended`: a run that calls itself running was killed."""
    keys = differing(runs)
    columns = ("status", "step", "tokens", "wall time", "cost", *METRICS)
    table = Table("run", *map(escape, keys), *columns)
    for run in runs:
        values = [escape(run.overrides.get(key, "-")) for key in keys]
        metrics = [metric_cell(name, run.series.get(name, [])) for name in METRICS]
        table.add_row(escape(run.name), *values, *status_cells(run, ended), *metrics)
    return table


def status_cells(run: Run, ended: bool) -> list[str]:
    """Status, step, tokens, wall time and cost; a run that left no word has failed."""
    status = run.status
    if status is None:
        return ["[red]failed[/]", *["-"] * 4]
    word = "failed" if ended and status.status == "running" else status.status
    colour = {"finished": "green", "failed": "red"}.get(word, "yellow")
    return [
        f"[{colour}]{escape(word)}[/]",
        str(status.step),
        tokens_cell(run.series, status.step),
        format_duration(status.wall_s),
        cost_cell(status),
    ]


def tokens_cell(series: dict[str, Points], steps: int) -> str:
    """Tokens read in all, by the mean of the logged steps."""
    rates, times = series.get("train/tokens_per_s", []), series.get("train/step_s", [])
    logged = [rate * s for (_, rate), (_, s) in zip(rates, times, strict=True)]
    return format_number(sum(logged) / len(logged) * steps) if logged else "-"


def cost_cell(status: Status) -> str:
    """Hours or seconds of all ranks together."""
    if status.device_s is None:
        return "-"
    device = "GPU" if status.device == "cuda" else "CPU"
    if status.device_s < 360:
        return f"{status.device_s:.0f} {device} s"
    return f"{status.device_s / 3600:.1f} {device} h"


def metric_cell(name: str, points: Points) -> str:
    """Last value, best value, and the step of the best."""
    if not points:
        return "-"
    metric = summarize(name, points)
    best = "" if metric.best is None else f" (best {metric.best:.4f} at {metric.best_step})"
    return f"{metric.last:.4f}{best}"


def print_summary(sweep_dir: Path, ended: bool = False, plot_path: Path | None = None) -> None:
    """Print the table, and draw the curves to `plot_path`."""
    runs = read_runs(sweep_dir)
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 240, force_terminal=terminal)
    console.print(summary_table(runs, ended))
    if plot_path is not None:
        measured = [name for name in METRICS if any(name in run.series for run in runs)]
        plot_runs({run.name: run.series for run in runs}, measured or METRICS, plot_path)


class SweepSummary(Callback):
    """Prints the comparison once when a Hydra multirun is over, however it ended."""

    def __init__(self, sweep_dir: str) -> None:
        self.sweep_dir = Path(sweep_dir).absolute()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls no `on_multirun_end` when a job fails; the end of the process still comes."""
        atexit.register(self._print)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print now."""
        atexit.unregister(self._print)
        self._print()

    def _print(self) -> None:
        try:
            print_summary(self.sweep_dir, ended=True)
        except UserError as error:
            print(f"sweep: {error}", file=sys.stderr)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare the runs below a directory.")
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curves (PNG, SVG)")
    args = parser.parse_args()
    try:
        print_summary(args.sweep_dir, plot_path=args.plot)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
