"""The SLURM scripts, as far as they go without SLURM: scripts/test_slurm.sh has the rest.

`srun` and `scontrol` are stand-ins, because there is no cluster.
"""

from __future__ import annotations

import functools
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kd.config import register, to_object
from kd.run import config_dir
from tests.processes import Process, completed

SCRIPTS = Path(__file__).parents[1] / "scripts"
SBATCH = sorted((SCRIPTS / "slurm").glob("*.sbatch"))
STAND_INS = {
    # Names the node where it is asked to, else says what it should start, waits if asked to, ends.
    "srun": """
        [ "${@: -1}" != hostname ] || { echo node; exit; }
        printf '%s\\n' "$@" >"$TOLD"
        trap 'exit 75' USR1
        for _ in $(seq "${WAITS:-0}"); do sleep 0.05; done
        exit "${CODE:-0}" """,
    # SLURM ends the script of a job that is queued again.
    "scontrol": """
        [ "$1" != show ] || { printf 'n1\\nn2\\n'; exit; }
        echo "$@" >"$TOLD.scontrol"
        kill "$PPID" """,
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start a script as the batch step of a job."""
    processes: list[Process] = []
    for name, body in STAND_INS.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def start(script: str, *args: str, **env: str) -> Process:
        job_env = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        env = {**os.environ, **job_env, "TOLD": str(tmp_path / "told"), **env}
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        # A run in this process has the signal held back for what is started after it.
        unblock = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGUSR1})
        command = ["bash", SCRIPTS / "slurm" / script, *args]
        options = {"env": env, "cwd": tmp_path, "preexec_fn": unblock}
        processes.append(Process(*command, one_output=True, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


def told(tmp_path: Path) -> list[str]:
    """What `kd.run` was started with."""
    words = (tmp_path / "told").read_text().splitlines()
    return words[words.index("kd.run") + 1 :]


@pytest.mark.parametrize("path", [*SBATCH, SCRIPTS / "test_slurm.sh"], ids=lambda path: path.name)
def test_scripts_parse(path):
    assert completed("bash", "-n", path).returncode == 0


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_options_of_sbatch_stand_before_the_first_command(path):
    """Where sbatch stops to look for them."""
    head = path.read_text().split("\nset -euo")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    options = {word for line in head if line.startswith("#SBATCH") for word in shlex.split(line)}
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= options


def test_a_point_of_a_sweep_is_a_line_of_the_file(job, tmp_path):
    (tmp_path / "points.txt").write_text(
        "# two points\n\nkd_ratio=0.5 loss=jsd\n  \nkd_ratio=0.9  data.path=/a/b\n"
    )
    args = ["points.txt", "runs/my_sweep", "--config-name", "digits_kd", "run.seed=3"]
    for number, name, ratio in (("1", "kd_ratio=0.5,loss=jsd", 0.5), ("2", None, 0.9)):
        process = job("sweep.sbatch", *args, SLURM_ARRAY_TASK_ID=number)
        assert process.wait() == 0, process.tail()
        words = told(tmp_path)
        assert words[:3] == ["--config-name", "digits_kd", "run.seed=3"]
        assert f"kd_ratio={ratio}" in words
        if name is None:
            assert words[-1] == "run.name='kd_ratio=0.9,data.path=.a.b'"
            continue
        register()
        with initialize_config_dir(config_dir(), version_base="1.3"):
            run = to_object(compose("digits_kd", overrides=words[2:])).run
        assert run.path == Path("runs/my_sweep") / name
    process = job("sweep.sbatch", *args, SLURM_ARRAY_TASK_ID="3")
    assert process.wait() == 2
    assert "points.txt has no line 3" in process.stdout


@pytest.mark.parametrize("script", ["train.sbatch", "sweep.sbatch"])
@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True)])
def test_only_a_run_that_was_stopped_is_queued_again(job, tmp_path, script, code, again):
    (tmp_path / "points.txt").write_text("kd_ratio=1\n")
    first = ["points.txt", "runs/s"] if script == "sweep.sbatch" else []
    args = [*first, "--config-name", "digits_kd"]
    process = job(script, *args, CODE=str(code), SLURM_ARRAY_TASK_ID="1")
    process.wait()
    queued = tmp_path / "told.scontrol"
    assert queued.exists() == again
    assert process.returncode == (-signal.SIGTERM if again else code)
    assert not again or queued.read_text() == "requeue 12\n"


def test_the_signal_of_the_time_limit_reaches_the_run(job, tmp_path):
    process = job("train.sbatch", "--config-name", "digits_kd", "a=b c", WAITS="400")
    process.wait_for((tmp_path / "told").exists)
    time.sleep(0.3)  # until its trap is set
    os.kill(process.pid, signal.SIGUSR1)
    process.wait()
    assert "stopped (exit code 75)" in process.stdout
    assert told(tmp_path) == ["--config-name", "digits_kd", "a=b c"]
