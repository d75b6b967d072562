"""Metrics, validation samples and rollouts on Weights & Biases. Needs the extra `kd-vlm[wandb]`."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import wandb
from wandb.errors import AuthenticationError, CommError, UsageError

from kd.logger.base import RolloutRecord, SampleRecord
from kd.logger.files import write_atomic
from kd.logger.images import thumbnail
from kd.logger.response import spread
from kd.types import UserError

if TYPE_CHECKING:
    from kd.logger.config import WandbLoggerConfig

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
MODES: dict[str, Literal["online", "offline", "disabled"]] = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
}


class WandbLogger:
    """Mirrors a run to wandb. A server that is away never ends the training; see `start`."""

    def __init__(self, run_dir: Path, options: WandbLoggerConfig) -> None:
        self.run_dir = Path(run_dir)
        self.options = options
        self._run: wandb.Run | None = None

    def start(self, config: dict[str, Any], total_steps: int, first_step: int) -> None:
        """Open the run, or re-open it under its id.

        Raises UserError for missing or refused credentials. If the server cannot be reached, says
        so and records the run offline.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._init(config, self.options.mode)
        except (AuthenticationError, UsageError) as error:
            raise UserError(
                f"logger=wandb: {_first_line(error)}\n"
                "Run `wandb login`, or use logger.mode=offline or logger=default"
            ) from error
        except CommError as error:
            wandb.teardown()  # its service would still hold the run id of this attempt
            self._run = self._init(config, "offline")
            log.warning(
                "wandb: no run on the server (%s). Training goes on and is recorded offline; "
                "upload it with: wandb sync %s",
                _first_line(error),
                self._run.settings.sync_dir,
            )
        # Steps are a metric like any other: wandb's own counter may not go back, and the steps
        # after a checkpoint are logged again when a killed run goes on.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _init(self, config: dict[str, Any], mode: str) -> wandb.Run:
        return wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            name=self.run_dir.name,
            tags=self.options.tags,
            config=config,
            dir=str(self.run_dir),
            id=run_id(self.run_dir),
            resume="allow",
            mode=MODES[mode],
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off",  # it would upload every frame of the progress bar
                init_timeout=self.options.init_timeout_s,
                finish_timeout=self.options.finish_timeout_s,
            ),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics."""
        with self._or_stop(step):
            if self._run is not None:
                self._run.log({"step": step, **metrics})

    def samples(self, step: int, rows: list[SampleRecord]) -> None:
        """Send the rows as a table, `val/samples`."""
        with self._or_stop(step):
            if self._run is not None:
                table = samples_table(rows, self.options.image_px)
                self._run.log({"step": step, "val/samples": table})

    def rollouts(self, step: int, rows: list[RolloutRecord]) -> None:
        """Send the rows as a table, `rollout/samples`."""
        with self._or_stop(step):
            if self._run is not None:
                table = rollouts_table(rows, self.options.image_px)
                self._run.log({"step": step, "rollout/samples": table})

    def close(self, failed: bool = False) -> None:
        """Wait for the uploads, at most `finish_timeout_s`."""
        with self._or_stop(None):
            if self._run is not None:
                self._run.finish(exit_code=int(failed))
        self._run = None

    @contextmanager
    def _or_stop(self, step: int | None) -> Iterator[None]:
        """Go on without wandb if its service has died: the run's own files have everything."""
        try:
            yield
        except (OSError, wandb.Error) as error:
            self._run = None
            when = "while closing" if step is None else f"at step {step}"
            log.warning(
                "wandb: failed %s (%s) and gets no more of this run. Training goes on; "
                "%s has all metrics",
                when,
                _first_line(error),
                self.run_dir / "metrics.jsonl",
            )


def run_id(run_dir: Path) -> str:
    """The id of this run on wandb, kept in the run directory so that a resumed run is the same."""
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        write_atomic(path, f"{secrets.token_hex(6)}\n".encode())
    return path.read_text().strip()


def samples_table(rows: list[SampleRecord], image_px: int) -> wandb.Table:
    """One row per sample, and one column per image of the sample with the most."""
    columns = {
        "question": str,
        "reference": str,
        "student": str,
        "teacher": str,
        "correct": bool,
    }
    cells = [(row.question, row.answer, row.student, row.teacher, row.correct) for row in rows]
    return _table(rows, columns, cells, image_px)


def rollouts_table(rows: list[RolloutRecord], image_px: int) -> wandb.Table:
    """One row per response, and what the divergences of its tokens come to."""
    columns = {
        "question": str,
        "reference": str,
        "policy": str,
        "response": str,
        "tokens": int,
        "divergence_mean": float,
        "divergence_highest": float,
        "divergence_nonfinite": int,
        "finished": bool,
        "staleness": int,
    }
    cells = [
        (
            *(row.question, row.answer, row.policy, "".join(row.tokens), len(row.tokens)),
            *astuple(spread(row.divergence)),
            *(row.finished, row.staleness),
        )
        for row in rows
    ]
    return _table(rows, columns, cells, image_px)


def _table(
    rows: Sequence[SampleRecord | RolloutRecord],
    columns: dict[str, type],
    cells: list[tuple[Any, ...]],
    image_px: int,
) -> wandb.Table:
    """Who and what each row is, its images, then `cells` under `columns`."""
    # A list of images in one cell would be stored as the text "Image".
    image_columns = max((len(row.images) for row in rows), default=0)
    image_types = {f"image_{i + 1}": wandb.Image for i in range(image_columns)}
    columns = {"id": str, "kind": str, **image_types, **columns}
    table = wandb.Table(columns=list(columns), dtype=list(columns.values()), optional=True)
    for row, values in zip(rows, cells, strict=True):
        images = [wandb.Image(thumbnail(image, image_px)) for image in row.images]
        images += [None] * (image_columns - len(images))
        table.add_data(row.id, row.kind, *images, *values)
    return table


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
