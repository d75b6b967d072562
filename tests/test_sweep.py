from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from rich.console import Console

from kd.logger.jsonl import JsonlLogger
from kd.sweep import differing, print_summary, read_runs, summary_table
from kd.types import UserError
from tests.processes import completed, python

APP = """
import json, sys
from pathlib import Path
import hydra
from kd.logger.jsonl import JsonlLogger

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def job(config):
    run_dir = Path(config.folder) / str(config.lr)
    logger = JsonlLogger(run_dir, 192)
    logger.start({}, 1, 0)
    (run_dir / "status.json").write_text('{"status": "running", "step": 0, "wall_s": 0.0}')
    if config.lr == config.fails_at:
        raise ValueError("as asked")
    logger.log(1, {"train/loss": config.lr})
    (run_dir / "status.json").write_text('{"status": "finished", "step": 1, "wall_s": 1.0}')

job()
"""
CONFIG = """
defaults: [_self_, {override hydra/job_logging: none}]
lr: 0.0
fails_at: -1
folder: ???
hydra:
  run: {dir: .}
  sweep: {dir: ., subdir: .}
  output_subdir: null
  callbacks:
    summary: {_target_: kd.sweep.SweepSummary, sweep_dir: "${folder}"}
"""


def make_run(
    path: Path, overrides: list[str], losses: list[float], status: str | None = "finished"
) -> None:
    logger = JsonlLogger(path, 192)
    logger.start({}, len(losses), 0)
    for step, loss in enumerate(losses, 1):
        logger.log(step, {"train/loss": loss, "val/accuracy": 1 - loss})
        logger.log(step, {"train/tokens_per_s": 2e6 / step, "train/step_s": 0.5 * step})
    (path / "config.yaml").write_text("run: {}\n")
    (path / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides))
    if status is not None:
        content = {"status": status, "step": len(losses), "wall_s": 61.2}
        content |= {"device": "cuda", "device_s": 8 * 450.0}
        (path / "status.json").write_text(json.dumps(content))


def rows(sweep_dir: Path, ended: bool = False) -> dict[str, list[str]]:
    """The printed table: head and rows by their first cell."""
    file = io.StringIO()
    Console(file=file, width=250).print(summary_table(read_runs(sweep_dir), ended))
    lines = [line for line in file.getvalue().splitlines() if line[0] in "┃│"]
    cells = [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def test_table_compares_overrides_and_metrics(tmp_path):
    make_run(tmp_path / "a", ["kd_ratio=0.5", "loss=jsd", "run.name=a"], [0.75, 0.25, 0.5])
    make_run(tmp_path / "deep" / "b", ["kd_ratio=1.0", "loss=jsd", "run.name=b"], [0.5])
    table = rows(tmp_path)
    assert table["run"] == [
        *("kd_ratio", "status", "step", "tokens", "wall time", "cost"),
        *("val/accuracy", "val/loss", "train/loss"),
    ]
    assert table["a"] == [
        *("0.5", "finished", "3", "3,000,000", "0:01:01", "1.0 GPU h"),
        *("0.5000 (best 0.7500 at 2)", "-", "0.5000 (best 0.2500 at 2)"),
    ]
    assert table["deep/b"][0] == "1.0"


def test_run_that_never_finished_has_failed(tmp_path):
    make_run(tmp_path / "killed", [], [0.5], status="running")
    make_run(tmp_path / "failed", [], [0.5], status="failed")
    make_run(tmp_path / "asked", [], [0.5], status="stopped")
    make_run(tmp_path / "early", [], [], status=None)
    names = ("killed", "failed", "early", "asked")
    assert [rows(tmp_path)[name][0] for name in names] == [
        *("running", "failed", "failed", "stopped"),
    ]
    table = rows(tmp_path, ended=True)
    assert [table[name][0] for name in names] == [*["failed"] * 3, "stopped"]
    assert table["early"] == ["failed", *["-"] * 7]


def test_run_without_overrides_makes_no_difference(tmp_path):
    make_run(tmp_path / "a", ["x=1", "y=a=b"], [0.5])
    make_run(tmp_path / "b", ["x=1", "y=[red]"], [0.5])
    make_run(tmp_path / "c", [], [0.5])
    (tmp_path / "c" / "overrides.yaml").unlink()
    assert differing(read_runs(tmp_path)) == ["y"]
    assert [rows(tmp_path)[name][0] for name in "abc"] == ["a=b", "[red]", "-"]


def test_folders_inside_a_run_are_no_runs(tmp_path):
    make_run(tmp_path / "a", [], [0.5])
    inside = tmp_path / "a" / "wandb" / "run-1" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("a: 1\n")
    assert [run.name for run in read_runs(tmp_path)] == ["a"]


def test_plot_is_a_picture(tmp_path, capsys):
    make_run(tmp_path / "a$^$", [], [0.75, 0.25])
    make_run(tmp_path / "empty", [], [])
    print_summary(tmp_path, plot_path=tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
    output = capsys.readouterr().out
    assert "a$^$" in output and "\x1b" not in output


def test_no_runs_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no runs below"):
        read_runs(tmp_path)


@pytest.fixture
def multirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Command line of a sweep over two points, in the current directory."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    return ["app.py", "-m", "lr=1,2", "folder=runs/lr_sweep"]


def statuses(output: str) -> list[list[str]]:
    table = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in table]


def test_multirun_ends_with_the_table(multirun, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", multirun)
    GlobalHydra.instance().clear()
    runpy.run_path("app.py", run_name="__main__")
    assert statuses(capsys.readouterr().out) == [["1", "finished"], ["2", "finished"]]


def test_multirun_with_a_failed_job_ends_with_the_table(multirun):
    """In a process of its own: Hydra tells nobody of the end, so it is the end of the process."""
    output = completed(*python(*multirun, "fails_at=1"))
    assert output.returncode != 0 and "as asked" in output.stderr
    assert statuses(output.stdout) == [["1", "failed"], ["2", "finished"]]
