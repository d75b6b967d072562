"""Line charts: as inline SVG in the colours of a page, light or dark; and as an image file."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd.logger.read import Points

# matplotlib knows no CSS: it draws in colours that nothing else uses, replaced afterwards.
INK, GRID = "#0a0b01", "#0a0b02"
SERIES = [f"#0a0c0{i}" for i in range(8)]
CSS_COLOURS = {INK: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
LINES = ("solid", "dashed", "dotted")
"""Styles known to both matplotlib and CSS; each serves all colours before the next begins."""
MARKED_POINTS = 30
"""Up to so many points a line shows where they are."""


@dataclass
class Chart:
    """A drawing, and what its lines are: the page sets the legend, which so can wrap."""

    title: str
    svg: Markup
    legend: list[LegendEntry]


@dataclass
class LegendEntry:
    """One line of a chart."""

    name: str
    colour: str
    """In CSS."""
    line: str
    """solid, dashed or dotted."""


def line_chart(title: str, series: dict[str, Points], share: bool = False) -> Chart:
    """A chart with one line per entry of `series`; values that are not finite leave a gap.

    `share`: the values are parts of a whole, shown on a scale from 0 to 1.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for i, points in enumerate(series.values()):
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                color=SERIES[i % len(SERIES)],
                linestyle=LINES[i // len(SERIES) % len(LINES)],
                linewidth=1.4,
                marker="o" if len(points) <= MARKED_POINTS else "",
                markersize=3,
            )
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("step")
        axes.margins(x=0.02, y=0.08)
        if share:
            axes.set_ylim(-0.02, 1.02)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    legend = [
        LegendEntry(name, f"var(--series-{i % len(SERIES)})", LINES[i // len(SERIES) % len(LINES)])
        for i, name in enumerate(series)
    ]
    return Chart(title, _for_page(buffer.getvalue(), title), legend)


def _for_page(svg: str, title: str) -> Markup:
    """Without XML head and fixed size, with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart; ids of a page are unique
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def plot_runs(runs: dict[str, dict[str, Points]], metrics: Sequence[str], path: Path) -> None:
    """Curves of all runs over each other, one panel per metric; PNG, SVG or PDF by the name."""
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(6 * len(metrics), 4.5), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, name in zip(panels, metrics, strict=True):
            axes.set(title=name, xlabel="step")
            for run, series in runs.items():  # an empty line too: a run has one colour everywhere
                points = series.get(name, [])
                marker = "." if len(points) <= MARKED_POINTS else ""
                steps, values = [x for x, _ in points], [y for _, y in points]
                axes.plot(steps, values, marker=marker, label=run)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(path, dpi=120)
