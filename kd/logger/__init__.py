"""Where metrics, answers and rollouts go: files always, the console and wandb by choice."""

from kd.logger.base import CompositeLogger, Logger, NullLogger, RolloutRecord, SampleRecord
from kd.logger.config import DefaultLoggerConfig, LoggerConfig, WandbLoggerConfig

__all__ = [
    "CompositeLogger",
    "DefaultLoggerConfig",
    "Logger",
    "LoggerConfig",
    "NullLogger",
    "RolloutRecord",
    "SampleRecord",
    "WandbLoggerConfig",
]
