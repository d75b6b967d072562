"""Compare the runs below a directory: `python -m kd.sweep runs/<name>_sweep [--plot FILE]`.

Also a Hydra callback that prints the same table when a multirun ends:

    hydra:
      callbacks:
        summary: {_target_: kd.sweep.SweepSummary, sweep_dir: runs/<name>_sweep}
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.logger.read import Points, Status, read_metrics, read_status, summarize
from kd.types import UserError

METRICS = ("val/accuracy", "val/loss", "train/loss")
RUN_FILES = {"config.yaml", "status.json", "metrics.jsonl"}
NOT_A_DIFFERENCE = ("run.name", "run.dir")


@dataclass
class Run:
    """What the comparison needs of one run."""

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
    return [read_run(path, str(path.relative_to(sweep_dir))) for path in sorted(found)]


def read_run(path: Path, name: str) -> Run:
    """One run directory."""
    saved = path / "overrides.yaml"
    lines = OmegaConf.to_container(OmegaConf.load(saved)) if saved.exists() else []
    overrides = dict(str(line).lstrip("+~").partition("=")[::2] for line in lines or [])
    name = path.resolve().name if name == "." else name
    return Run(name, read_status(path), overrides, read_metrics(path))


def differing(runs: list[Run]) -> list[str]:
    """The keys overridden differently among `runs`."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [
        key
        for key in keys
        if key not in NOT_A_DIFFERENCE and len({run.overrides.get(key) for run in runs}) > 1
    ]


def summary_table(runs: list[Run], ended: bool) -> Table:
    """One row per run; `ended`: a run that calls itself running was killed."""
    keys = differing(runs)
    table = Table("run", *map(escape, keys), "status", "step", "wall time")
    for name in METRICS:
        table.add_column(name, justify="right")
        table.add_column("best (step)", justify="right")
    for run in runs:
        values = [escape(run.overrides.get(key, "–")) for key in keys]
        table.add_row(escape(run.name), *values, *status_cells(run.status, ended), *cells(run))
    return table


def status_cells(status: Status | None, ended: bool) -> tuple[str, str, str]:
    """Status, step and wall time; a run that left no word has failed."""
    if status is None:
        return "[red]failed[/]", "–", "–"
    word = "failed" if ended and status.status != "finished" else status.status
    colour = {"finished": "green", "failed": "red"}.get(word, "yellow")
    wall = str(timedelta(seconds=round(status.wall_s)))
    return f"[{colour}]{escape(word)}[/]", str(status.step), wall


def cells(run: Run) -> list[str]:
    """Last and best value of each metric."""
    texts = []
    for name in METRICS:
        if name not in run.series:
            texts += ["–", "–"]
            continue
        metric = summarize(name, run.series[name])
        best = "–" if metric.best is None else f"{metric.best:.4f} ({metric.best_step})"
        texts += [f"{metric.last:.4f}", best]
    return texts


def plot(runs: list[Run], path: Path) -> None:
    """Curves of all runs over each other, one panel per metric; PNG, SVG or PDF by the name."""
    figure = Figure(figsize=(6 * len(METRICS), 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        for i, run in enumerate(runs):  # the colour is the run's, also where others lack the metric
            points = run.series.get(name, [])
            axes.plot([x for x, _ in points], [y for _, y in points], color=f"C{i % 10}")
    figure.legend(axes.lines, [run.name for run in runs], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def print_summary(sweep_dir: Path, ended: bool = False, plot_path: Path | None = None) -> None:
    """Print the table; as wide as it must be where no terminal sets a limit."""
    runs = read_runs(sweep_dir)
    Console(width=None if sys.stdout.isatty() else 240).print(summary_table(runs, ended))
    if plot_path is not None:
        plot(runs, plot_path)


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
