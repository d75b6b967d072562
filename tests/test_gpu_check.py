"""The driver of scripts/gpu_check.sh, on rows that pass, fail, hang, are skipped and break."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import zipfile
from pathlib import Path

import gpu_report
import peers
import psutil
import pytest
from gpu_report import Row

from tests.processes import completed, python, wait_for

ROWS_FILE = """
import json, os, subprocess, sys, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent

def found(name, value):
    with open(os.environ["KD_GPU_FOUND"], "a") as file:
        file.write(json.dumps([name, value]) + "\\n")

def test_passes():
    found("error", 1.25e-7)
    (HERE / "order.txt").open("a").write("passes ")

def test_fails():
    found("error", 0.5)
    assert 0.5 < 0.1, "more than there should be"

def test_hangs():
    found("before", "this")
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn])
    (HERE / "child.txt").write_text(str(child.pid))
    time.sleep(600)

def test_is_skipped():
    pytest.skip("nothing of the kind here")

def test_breaks():
    print("the last words", flush=True)
    os._exit(7)

def test_not_of_a_gpu():
    raise AssertionError("selected")
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of tests, in a project of its own."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    (tmp_path / "test_rows.py").write_text(textwrap.dedent(ROWS_FILE))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "test_rows.py"


def row(rows: Path, name: str, limit_s: float = 300) -> Row:
    return Row(name, f"{rows}::test_{name}", limit_s, "what there should be")


def test_whatever_becomes_of_a_row_the_next_one_goes_on(rows, tmp_path, capfd):
    out = tmp_path / "out"
    names = ["fails", "hangs", "is_skipped", "breaks", "passes"]
    plan = [row(rows, name, 10 if name == "hangs" else 300) for name in names]
    said: list[str] = []
    assert not gpu_report.run(plan, out, 900, imports=("json",), say=said.append)

    report = json.loads((out / "report.json").read_text())
    found = {entry["name"]: entry for entry in report["rows"]}
    status = [entry["status"] for entry in report["rows"]]
    assert status == ["failed", "timed out", "skipped", "failed", "passed"]
    assert "more than there should be" in found["fails"]["why"]
    assert found["fails"]["found"] == {"error": 0.5}
    assert found["hangs"]["why"] == "not ended within 10 s"
    assert found["hangs"]["found"] == {"before": "this"}
    assert "nothing of the kind here" in found["is_skipped"]["why"]
    assert found["breaks"]["why"].startswith("exit code 7: ")
    assert found["passes"]["found"] == {"error": 1.25e-7}
    assert report["machine"]["torch"] and report["machine"]["Python"]

    child = int((tmp_path / "child.txt").read_text())
    wait_for(lambda: not psutil.pid_exists(child) or is_zombie(child))
    text = (out / "report.txt").read_text()
    assert "2 failed, 1 timed out, 1 skipped, 1 passed" in text
    assert "| passes | passed | " in text and "error: 1.25e-07 |" in text
    assert len(said) == 6 and said[0].startswith("failed")
    log = capfd.readouterr().err
    assert "the last words" in log
    assert "test_hangs" in log and 'File "' in log, "the stacks of what hangs"
    assert {path.name for path in out.iterdir()} == {"report.txt", "report.json"}


def is_zombie(pid: int) -> bool:
    """Of a process whose parent is an init that does not wait."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_time_that_is_up_leaves_rows_out(rows, tmp_path, monkeypatch):
    """And cuts the one that runs; what was found before is in the report."""
    monkeypatch.setattr(gpu_report, "LEAST_S", 0.5)
    plan = [row(rows, "hangs"), row(rows, "passes")]
    gpu_report.run(plan, tmp_path / "out", 8, imports=("json",), say=lambda _: None)
    entries = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert [entry["status"] for entry in entries] == ["timed out", "not run"]
    assert entries[1]["why"] == "no time left"
    assert not (tmp_path / "order.txt").exists()


def test_every_row_is_a_test_of_a_gpu(repo):
    """And every test of the folder is in a row; the last one has those of other folders."""
    targets = " ".join(row.tests for row in gpu_report.ROWS[:-1]).split()
    assert len({row.name for row in gpu_report.ROWS}) == len(gpu_report.ROWS)
    collect = python("-m", "pytest", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider")
    listed = {}
    for name, what in (("folder", ["tests/gpu"]), ("rows", targets)):
        done = completed(*collect, *what, cwd=repo)
        assert done.returncode == 0, done.tail()
        listed[name] = {line for line in done.stdout.splitlines() if "::" in line}
    assert listed["rows"] == listed["folder"] and len(listed["rows"]) >= len(targets)


def test_the_check_here_says_that_there_is_no_gpu(repo, tmp_path):
    """The command as a whole, with a row that needs no import of ours to be skipped."""
    check = ["bash", repo / "scripts/gpu_check.sh", tmp_path / "out", "--rows", "GEMM"]
    check += ["--seconds", "800"]
    env = {**os.environ, "KD_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = completed(*check, env=env)
    assert done.returncode == 1, done.tail()
    assert "skipped" in done.stdout and "no CUDA device" in done.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"report.txt", "report.json", "log.txt"}


def test_the_page_has_every_row_as_it_is(repo):
    page = (repo / "docs/gpu.md").read_text().splitlines()
    cells = [f"| {row.name} | {row.expected} |" for row in gpu_report.ROWS]
    start = page.index(cells[0])
    assert page[start : start + len(cells) + 1] == [*cells, ""]


def test_wheels_that_a_machine_lacks(tmp_path):
    version = psutil.__version__
    names = [
        f"psutil-{version}-cp312-abi3-any.whl",
        "psutil-99999.0-py3-none-any.whl",
        "psutil-0.1-py3-none-any.whl",
        "not_a_package_of_this_name-1.0-py3-none-any.whl",
    ]
    for name in names:
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name}.py", "")
    gpu_report.unpack(tmp_path, tmp_path / "site")
    unpacked = {path.stem for path in (tmp_path / "site").iterdir()}
    assert unpacked == {names[3], names[1]}


def test_peers_that_a_folder_lacks(tmp_path):
    """One that another benchmark, or an older one, has filled."""
    everything = [f"{name}=={version}" for name, version in peers.PEERS.items()]
    assert peers.missing(tmp_path) == everything
    for name, version in (("trl", peers.PEERS["trl"]), ("liger_kernel", "0.0.1")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert peers.missing(tmp_path) == [x for x in everything if not x.startswith("trl")]
