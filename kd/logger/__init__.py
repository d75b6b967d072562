"""Where metrics and validation samples go: files always, the console and wandb by choice."""

from kd.logger.base import CompositeLogger, Logger, NullLogger, SampleRecord
from kd.logger.config import DefaultLoggerConfig, LoggerConfig, WandbLoggerConfig

__all__ = [
    "CompositeLogger",
    "DefaultLoggerConfig",
    "Logger",
    "LoggerConfig",
    "NullLogger",
    "SampleRecord",
    "WandbLoggerConfig",
]
