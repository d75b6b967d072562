"""Exact-answer accuracy on held-out images, per question type, as a table.

    python scripts/digits_table.py runs/digits_teacher runs/digits_kd runs/digits_ce
    python scripts/digits_table.py kd=runs/a/digits_kd,runs/b/digits_kd ce=runs/a/digits_ce,…

Each argument is a run directory, or `name=dir,dir,…` for one row over several seeds: mean and
standard deviation over the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

KINDS = ("which", "parity", "larger", "next", "count")
COLUMNS = ("val/accuracy", *(f"val/accuracy_{kind}" for kind in KINDS))


def last_validation(run_dir: Path) -> dict[str, float]:
    """The metrics of the last validation of a finished run."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
        lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error.filename} is missing: is {run_dir} a run?") from None
    if status["status"] != "finished":
        raise SystemExit(f"error: {run_dir} is {status['status']}: run its command again first")
    return {k: v for line in lines for k, v in line.items() if k.startswith("val/")}


def cell(values: list[float]) -> str:
    """`91.5` of one run, `91.5 ± 1.2` of several, in per cent."""
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """Print the table, or Markdown with --markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directory, or name=dir,dir,…")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    table: list[list[str]] = []
    for argument in args.runs:
        name, _, folders = argument.rpartition("=")
        paths = [Path(folder) for folder in folders.split(",")]
        results = [last_validation(path) for path in paths]
        cells = [cell([result[column] for result in results]) for column in COLUMNS]
        table.append([name or paths[0].name, *cells])
    header = ["run", "all", *KINDS]
    if args.markdown:
        rows = [header, ["---"] * len(header), *table]
        sys.stdout.writelines(f"| {' | '.join(row)} |\n" for row in rows)
        return
    shown = Table(*header)
    for row in table:
        shown.add_row(*row)
    Console().print(shown)


if __name__ == "__main__":
    main()
