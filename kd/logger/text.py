"""Numbers and times for people to read."""

from __future__ import annotations

from datetime import timedelta


def format_duration(seconds: float) -> str:
    """Days, hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def format_number(value: float) -> str:
    """Five significant digits; large numbers in full, with thousands marked."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"
