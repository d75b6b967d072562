"""The options of the config group `logger`. `metrics.jsonl` is written with every one of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rich.console import Console

from kd.logger.base import CompositeLogger, Logger, NullLogger
from kd.logger.console import console_logger
from kd.logger.jsonl import JsonlLogger
from kd.types import UserError

WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class LoggerConfig:
    """Option `jsonl`: the files of the run directory and nothing else."""

    image_px: int = 192
    """Longest side that the images of samples and rollouts are kept with."""

    def validate(self) -> None:
        """Raise UserError for values out of range."""
        if self.image_px < 1:
            raise UserError(f"logger.image_px={self.image_px}: must be at least 1")

    def build(self, run_dir: Path, rank: int) -> Logger:
        """The logger of one rank; every rank but the first gets a NullLogger."""
        self.validate()
        return CompositeLogger(self.loggers(run_dir)) if rank == 0 else NullLogger()

    def loggers(self, run_dir: Path) -> list[Logger]:
        """The parts of the first rank's logger, in the order they are started."""
        return [JsonlLogger(run_dir, self.image_px)]


@dataclass
class DefaultLoggerConfig(LoggerConfig):
    """Option `default`: the files and the console."""

    def loggers(self, run_dir: Path) -> list[Logger]:
        """Files, console."""
        # Not left to rich, which also takes FORCE_COLOR for a terminal.
        console = Console(force_terminal=sys.stdout.isatty())
        return [*super().loggers(run_dir), console_logger(console)]


@dataclass
class WandbLoggerConfig(DefaultLoggerConfig):
    """Option `wandb`: the files, the console and Weights & Biases."""

    project: str = "kd-vlm"
    entity: str | None = None
    """Team or user; None: the default of the account."""
    mode: str = "online"
    """online, offline (kept in the run directory, `wandb sync` uploads it), or disabled."""
    tags: list[str] = field(default_factory=list)
    init_timeout_s: float = 90.0
    """Longest wait for the server at the start; then the run is recorded offline."""
    finish_timeout_s: float = 300.0
    """Longest wait for uploads at the end; what is left stays on disk for `wandb sync`."""

    def validate(self) -> None:
        """Raise UserError for an unknown mode, or if wandb is not installed."""
        super().validate()
        if self.mode not in WANDB_MODES:
            raise UserError(f"logger.mode={self.mode}: use {', '.join(WANDB_MODES)}")
        if min(self.init_timeout_s, self.finish_timeout_s) <= 0:
            raise UserError("logger.init_timeout_s and logger.finish_timeout_s must be above 0")
        try:
            distribution("wandb")  # an import would take a folder named wandb for the package
        except PackageNotFoundError:
            raise UserError(
                'logger=wandb needs the package wandb: pip install "kd-vlm[wandb]", '
                "or choose logger=default"
            ) from None

    def loggers(self, run_dir: Path) -> list[Logger]:
        """Wandb, then files and console: a progress bar must start last."""
        from kd.logger.wandb import WandbLogger  # optional dependency, and slow to import

        return [WandbLogger(run_dir, self), *super().loggers(run_dir)]
