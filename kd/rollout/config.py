"""Base of the `rollout` options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RolloutConfig:
    """Where the responses that are trained on come from."""

    def validate(self) -> None:
        """Refuse values out of range."""
