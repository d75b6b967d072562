"""Progress for the person who watches: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from kd.logger.base import Logger, RolloutRecord, SampleRecord
from kd.logger.text import format_duration

LINE_PARTS = {
    "train/loss": "loss {:.4f}",
    "train/ce": "ce {:.4f}",
    "train/kd": "kd {:.4f}",
    "train/grad_norm": "grad_norm {:.3f}",
    "train/lr": "lr {:.2e}",
    "train/tokens_per_s": "{:,.0f} tokens/s",
    "train/step_s": "{:.2f} s/step",
    "rollout/length_mean": "rollouts {:.1f} tokens",
    "rollout/truncated": "{:.1%} truncated",
}
RECENT_S, RECENT_CALLS = 120.0, 10
"""The pace is that of so many seconds, and of at least so many calls."""
BAR_PARTS = {name: LINE_PARTS[name] for name in ("train/loss", "train/tokens_per_s")}


def console_logger(console: Console) -> Logger:
    """A progress bar if `console` is a terminal that can redraw a line, else plain lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        return BarLogger(console)
    return LineLogger(console)


class Pace:
    """Time left, at the recent pace in wall time, validation and checkpoints included."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps = total_steps
        self._began = time.monotonic()
        self._marks = deque([(self._began, first_step)])
        self._warm = False

    def left_s(self, step: int) -> float:
        """Seconds left after `step`; the steps of the first call count in that call alone."""
        now = time.monotonic()
        began, first_step = self._marks[0]
        step_s = (now - began) / max(step - first_step, 1)
        if not self._warm:  # the first steps compile kernels and start workers
            self._marks.clear()
            self._warm = True
        self._marks.append((now, step))
        while len(self._marks) > RECENT_CALLS and self._marks[1][0] < now - RECENT_S:
            self._marks.popleft()
        return step_s * max(self.total_steps - step, 0)

    def left(self, step: int) -> str:
        """`left_s` for people."""
        return f"left {format_duration(self.left_s(step))}"

    def end(self, step: int, failed: bool) -> str:
        """How the run ended, and how long this process took."""
        elapsed = format_duration(time.monotonic() - self._began)
        outcome = "failed" if failed else "finished" if step == self.total_steps else "stopped"
        return f"{outcome} at step {step} after {elapsed}"


class LineLogger:
    """One line per call, without control codes; for log files and batch jobs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Note the time."""
        self._pace = Pace(total_steps, first_step)
        self._step = first_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A line for train and rollout metrics and one for validation metrics, where given."""
        self._step = step
        head = f"step {step}/{self._pace.total_steps}"
        if train := _format(LINE_PARTS, metrics):
            self._print(
                "  ".join([head, *train, f"left {format_duration(self._pace.left_s(step))}"])
            )
        if val := val_text(metrics):
            self._print(f"{head}  val  {val}")

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Not shown here."""

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Not shown here."""

    def close(self, failed: bool = False) -> None:
        """A last line."""
        self._print(self._pace.end(self._step, failed))

    def _print(self, line: str) -> None:
        # Around rich, which would fold the line at 80 columns.
        print(line, file=self.console.file, flush=True)


class BarLogger:
    """A progress bar on the last line of a terminal, validation lines above it."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Show the bar."""
        self._pace = Pace(total_steps, first_step)
        self._step = first_step
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step)
        self._progress.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Move the bar; print validation metrics above it."""
        self._step = step
        if train := _format(BAR_PARTS, metrics):
            status = "  ".join([*train, self._pace.left(step)])
            self._progress.update(self._task, completed=step, description=status)
        if val := val_text(metrics):
            self._print(f"step {step}  val  {val}")

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Not shown here."""

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Not shown here."""

    def close(self, failed: bool = False) -> None:
        """Leave the bar as it stands, and a last line."""
        self._progress.stop()
        self._print(self._pace.end(self._step, failed))

    def _print(self, line: str) -> None:
        # As Text: a kind of question in brackets would be read as markup.
        self.console.print(Text(line), soft_wrap=True)


def val_text(metrics: dict[str, float]) -> str:
    """Every validation metric, without its prefix; empty if there is none."""
    return "  ".join(
        f"{name.removeprefix('val/')} {value:.4g}"
        for name, value in metrics.items()
        if name.startswith("val/")
    )


def _format(parts: dict[str, str], metrics: dict[str, float]) -> list[str]:
    return [text.format(metrics[name]) for name, text in parts.items() if name in metrics]
