"""Runs the rows of the GPU check one after the other, and says what was expected and found.

    bash scripts/gpu_check.sh OUT               # with what the machine lacks; see docs/gpu.md

Each row is a pytest process with a limit of its own; the next one goes on whatever became of it.
report.txt, report.json and log.txt in OUT hold what is known after every row, so that a check that
is cut off leaves what it has found. The exit code is 0 if every row passed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPO = Path(__file__).parents[1]
FOUND = "KD_GPU_FOUND"
"""Names the file that tests append `[name, value]` to, see tests/gpu/conftest.py."""
IMPORTS = ("torch", "transformers", "kd.run", "recipes.vlm_kd")
LEAST_S = 5.0
"""A row that has less left is not begun."""
STACKS_S = 2.0
"""For a process that hangs to write its stacks."""
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "liger-kernel", "trl")


@dataclass
class Row:
    """One line of the table in docs/gpu.md."""

    name: str
    tests: str
    """As pytest is told; parts are separated by spaces."""
    limit_s: float
    expected: str


ROWS = (
    Row("machine", "tests/gpu/test_gpu_basics.py::test_machine", 40, "torch.compile works"),
    Row(
        "GEMMs with fp32 output",
        "tests/gpu/test_gpu_basics.py::test_gemms",
        40,
        "relative error < 2e-6; NaN in the output is not read at beta 0",
    ),
    Row(
        "objective against float64",
        "tests/gpu/test_gpu_objective.py::test_against_float64",
        80,
        "error of the loss < 1e-5, of gradients < 5e-3, for every loss and kernel",
    ),
    Row(
        "objective without host syncs",
        "tests/gpu/test_gpu_objective.py::test_no_host_sync",
        40,
        "none in forward and backward",
    ),
    Row(
        "tiny recipes in bf16, resume",
        "tests/gpu/test_gpu_recipe.py::test_bf16_and_resume",
        100,
        "losses within 2% of fp32 on a CPU; the same after a resume",
    ),
    Row(
        "objective beside its floor and peers",
        "tests/gpu/test_gpu_bench.py::test_large",
        120,
        "at most 1.6 x floor (aim: 1.15); forward KL peak <= 5.3 GB",
    ),
    Row(
        "linear attention, fused against fallback",
        "tests/gpu/test_gpu_attention.py::test_linear_attention",
        60,
        "error < 1e-2",
    ),
    Row(
        "plan against peak reserved memory",
        "tests/gpu/test_gpu_plan.py::test_plan",
        80,
        "within 10%",
    ),
    Row("host syncs per step", "tests/gpu/test_gpu_recipe.py::test_host_syncs", 60, "recorded"),
    Row(
        "teacher.offload, parallel.cpu_offload",
        "tests/gpu/test_gpu_recipe.py::test_offloads",
        60,
        "losses unchanged; times recorded",
    ),
    Row(
        "FlexAttention against dense",
        "tests/gpu/test_gpu_attention.py::test_flex",
        60,
        "equal, at most 3 graphs for 10 shapes",
    ),
    Row(
        "generation, gathered against plain",
        "tests/gpu/test_gpu_recipe.py::test_generation",
        60,
        "the same ids",
    ),
    Row(
        "profile",
        "tests/gpu/test_gpu_recipe.py::test_profile",
        40,
        "parts sum to the step; kernels have time",
    ),
    Row("objective at N 200", "tests/gpu/test_gpu_bench.py::test_small", 60, "recorded"),
    Row("other tests of a GPU", "tests --ignore=tests/gpu", 60, "pass"),
)
"""Those that matter most come first: a check that is cut off loses the others."""


@dataclass
class Result:
    """What became of a row."""

    name: str
    expected: str
    status: str = "not run"
    """passed, failed, timed out, skipped or not run."""
    why: str = "no time left"
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)


# ---- one row -------------------------------------------------------------------------------------


class Process:
    """A row's process: imports at once, runs its tests when told to."""

    def __init__(self, row: Row, folder: Path, imports: Sequence[str]) -> None:
        self.row, self.folder, self.ended = row, folder, False
        folder.mkdir()
        tests = [*row.tests.split(), f"--junitxml={folder / 'result.xml'}"]
        self.ready, write_end = os.pipe()
        command = [sys.executable, __file__, "--row", str(write_end), *imports, "--", *tests]
        env = os.environ | {FOUND: str(folder / "found.jsonl"), "PYTHONFAULTHANDLER": "1"}
        with (folder / "log.txt").open("wb") as log:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=[write_end],
                start_new_session=True,
            )
        os.close(write_end)

    def run(self, left_s: float) -> Result:
        """Have it take its turn; its limit does not count the imports."""
        start_s = time.monotonic()
        select.select([self.ready], [], [], left_s)  # imports are done, or it has ended
        limit_s = min(self.row.limit_s, left_s - (time.monotonic() - start_s))
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed already
            self.popen.stdin.write(b"go\n")
            self.popen.stdin.close()
        result = Result(self.row.name, self.row.expected)
        try:
            self.popen.wait(max(limit_s, 0.1))
            result.status, result.why = outcome(self.folder, self.popen.returncode)
        except subprocess.TimeoutExpired:
            self.popen.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STACKS_S)
            result.status, result.why = "timed out", f"not ended within {limit_s:.0f} s"
        self.end()
        result.found = found(self.folder)
        result.seconds = time.monotonic() - start_s
        return result

    def end(self) -> None:
        """Kill it with all that it has started."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
            os.close(self.ready)


def take_turn(ready: int, arguments: list[str]) -> int:
    """In the row's process: import, say so, wait for the turn, run the tests."""
    cut = arguments.index("--")
    for name in arguments[:cut]:
        importlib.import_module(name)
    import pytest

    os.close(ready)
    if not sys.stdin.readline():  # whoever started this has gone
        return 1
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-o", "timeout=0", "-s"]
    return pytest.main([*options, *arguments[cut + 1 :]])


def outcome(folder: Path, code: int) -> tuple[str, str]:
    """Status of a row that has ended, and why where it did not pass."""
    path = folder / "result.xml"
    if not path.exists():
        return "failed", f"exit code {code}: {last_line(folder)}"
    cases = list(ElementTree.parse(path).iter("testcase"))
    for status, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
        reasons = [case.find(tag) for case in cases for tag in tags]
        texts = [x.get("message", "").strip().split("\n")[0] for x in reasons if x is not None]
        if texts and (status == "failed" or len(texts) == len(cases)):
            return status, "; ".join(dict.fromkeys(texts))
    if code or not cases:
        return "failed", f"exit code {code}: {last_line(folder)}"
    return "passed", ""


def last_line(folder: Path) -> str:
    """Of what a row has printed."""
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def found(folder: Path) -> dict[str, Any]:
    """What the tests have recorded; a line that a killed process left unfinished is left out."""
    path, values = folder / "found.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            name, value = json.loads(line)
            values[name] = value
    return values


# ---- all of them ---------------------------------------------------------------------------------


def check(rows: Sequence[Row], seconds: float, imports: Sequence[str]) -> Iterator[Result]:
    """The result of each row, in order, as long as `seconds` leave time to begin one."""
    ends_s = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:

        def start(i: int) -> Process | None:
            if i == len(rows):
                return None
            process = Process(rows[i], Path(folder) / str(i), imports)
            started.callback(process.end)
            return process

        process = start(0)
        for i, row in enumerate(rows):
            left_s = ends_s - time.monotonic()
            if process is None or left_s < LEAST_S:
                return
            following = start(i + 1)  # it imports while this one runs
            result = process.run(left_s)
            log = (process.folder / "log.txt").read_text(errors="replace")
            print(f"{'=' * 20} {row.name}\n{log[-100_000:]}", file=sys.stderr, flush=True)
            yield result
            process = following


def machine() -> dict[str, str]:
    """Card, driver and versions, without CUDA being touched."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        card = ""
    versions = {"GPU, driver, memory": card or "none"}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {**versions, "Python": platform.python_version()}


def as_text(report: dict[str, Any]) -> str:
    """Markdown, for docs/gpu.md."""
    counts = [row["status"] for row in report["rows"]]
    summary = ", ".join(f"{counts.count(s)} {s}" for s in dict.fromkeys(counts))
    about = "; ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [f"{report['date']}: {about}", "", f"{summary}; {report['seconds']:.0f} s", ""]
    lines += ["| row | result | s | expected | found |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        values = [f"{name}: {show(value)}" for name, value in row["found"].items()]
        cells = [row["name"], row["status"], f"{row['seconds']:.0f}", row["expected"]]
        said = "; ".join([row["why"], *values] if row["why"] else values)
        lines.append("| " + " | ".join([*cells, said.replace("|", "/").replace("\n", " ")]) + " |")
    return "\n".join([*lines, ""])


def show(value: Any) -> str:
    """A number in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def run(
    rows: Sequence[Row],
    out: Path,
    seconds: float,
    imports: Sequence[str] = IMPORTS,
    say: Callable[[str], None] = print,
) -> bool:
    """Whether every row has passed; the report is in `out` and grows row by row."""
    out.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    results = [Result(row.name, row.expected) for row in rows]
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
    }

    def save() -> None:
        took_s = time.monotonic() - start_s
        report.update(seconds=took_s, rows=[asdict(result) for result in results])
        write(out / "report.json", json.dumps(report, indent=1))
        write(out / "report.txt", as_text(report))

    save()
    for i, result in enumerate(check(rows, seconds, imports)):
        results[i] = result
        save()
        say(f"{result.status:<10}{result.seconds:6.1f} s  {result.name}  {result.why}")
    say(f"written: {out / 'report.txt'}")
    return all(result.status == "passed" for result in results)


# ---- wheels --------------------------------------------------------------------------------------


def unpack(folder: Path, site: Path) -> None:
    """What the interpreter lacks, for PYTHONPATH; needs no pip, which not every venv has."""
    for wheel in lacking(folder):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)


def lacking(folder: Path) -> list[Path]:
    """Wheels in this folder of what the interpreter does not have, or has older."""
    return [wheel for wheel in sorted(folder.glob("*.whl")) if _is_lacking(wheel)]


def _is_lacking(wheel: Path) -> bool:
    name, version = wheel.name.split("-")[:2]
    try:
        return _numbers(importlib.metadata.version(name)) < _numbers(version)
    except importlib.metadata.PackageNotFoundError:
        return True


def _numbers(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)]


def main() -> None:
    """See the head of this file."""
    if sys.argv[1:2] == ["--row"]:
        sys.exit(take_turn(int(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/gpu_check"))
    parser.add_argument("--seconds", type=float, default=480, help="for all rows together")
    parser.add_argument("--rows", help="only those whose name has this in it")
    parser.add_argument(
        "--unpack", type=Path, nargs=2, metavar=("WHEELS", "SITE"), help="wheels that are lacking"
    )
    args = parser.parse_args()
    if args.unpack:
        unpack(*args.unpack)
        return
    rows = [row for row in ROWS if not args.rows or args.rows in row.name]
    sys.exit(not run(rows, args.out, args.seconds))


if __name__ == "__main__":
    main()
