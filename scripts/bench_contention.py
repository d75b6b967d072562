"""Steps on a CPU beside other work: how long idle OpenMP threads should spin before they sleep.

Runs short trainings under several settings of the environment, each on a quiet machine and beside
as many busy loops as there are cores, and prints the median and the longest step:

    python -m kd.run --config-name digits_teacher
    python scripts/bench_contention.py --teacher runs/digits_teacher/export
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kd.parallel import num_cores
from kd.process import SPIN_COUNT, WAITING, children_end_with_this

SETTINGS: dict[str, dict[str, str]] = {
    "GNU's default": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=500": {"GOMP_SPINCOUNT": "500"},
    f"kd's {SPIN_COUNT}": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
TEXT, VISION = (f"student.architecture.{part}_config" for part in ("text", "vision"))
ALONE = ["teacher=none", "kd_ratio=0"]
WORKLOADS = {
    "digits": [],
    "mid-sized": [  # 25 million parameters
        *ALONE,
        *(f"{TEXT}.hidden_size=512", f"{TEXT}.intermediate_size=1536"),
        f"{VISION}.out_hidden_size=512",
        *(f"{TEXT}.num_attention_heads=8", f"{TEXT}.num_key_value_heads=4", f"{TEXT}.head_dim=64"),
        f"{TEXT}.rope_parameters.mrope_section=[12,10,10]",
        f"{TEXT}.num_hidden_layers=6",
        f"{TEXT}.layer_types=[{','.join(['full_attention'] * 6)}]",
    ],
    "generation": ["rollout=student", "kd_ratio=1", "rollout.sampling.max_new_tokens=12"],
    "two ranks": ["parallel.nproc=2", "train.micro_batch_size=16"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    for workload in args.workloads:
        table = Table(title=f"{workload}: median, longest step in s", title_justify="left")
        for column in ("threads", "quiet", f"beside {num_cores()} busy loops", "ratio"):
            table.add_column(column)
        for name in args.settings:
            quiet = step_times(workload, SETTINGS[name], args)
            with busy_loops(num_cores()):
                busy = step_times(workload, SETTINGS[name], args)
            ratio = statistics.median(busy) / statistics.median(quiet)
            table.add_row(name, shown(quiet), shown(busy), f"{ratio:.2f}")
        Console(width=100).print(table)


def shown(steps_s: list[float]) -> str:
    return f"{statistics.median(steps_s):.3f}, {max(steps_s):.2f}"


def step_times(workload: str, setting: dict[str, str], args: argparse.Namespace) -> list[float]:
    """Seconds of each step but the first five."""
    env = {name: value for name, value in os.environ.items() if name not in WAITING} | setting
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "kd.run",
            "--config-name",
            "digits_kd",
            *WORKLOADS[workload],
        ]
        command += [f"teacher.name={args.teacher}"] * ("teacher=none" not in command)
        command += [f"train.max_steps={args.steps}", "train.log_every=1", "train.val_every=null"]
        command += ["logger=jsonl", "doctor=never", "train.save_every=null"]
        command += [f"run.dir={folder}", "run.name=run"]
        with children_end_with_this():
            env["KD_PARENT_PID"] = os.environ["KD_PARENT_PID"]
            done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    steps = [row["train/step_s"] for row in map(json.loads, lines) if "train/step_s" in row]
    return steps[5:]


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Other work that wants all of so many cores."""
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    main()
