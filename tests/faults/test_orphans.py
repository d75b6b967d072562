"""Whatever a user starts and kills: 5 seconds later none of its processes is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import FAST
from tests.model.families import write
from tests.processes import Process, environment, python, started, wait_for

LEFT_S = 5.0
RUN = [
    *("--config-name", "digits_teacher", *FAST, "student=digits_small", "doctor=never"),
    *("logger=jsonl", "train.max_steps=100000", "data.num_workers=2", "run.name=run"),
]
RANKS = ["--standalone", "--nproc-per-node=2", "-m", "kd.run"]
COMMANDS = {
    "run": ["-m", "kd.run", *RUN],
    "ranks": ["-m", "kd.run", *RUN, "parallel.nproc=2"],
    "kd.torchrun": ["-m", "kd.torchrun", *RANKS, *RUN],
    "torchrun": ["-m", "torch.distributed.run", *RANKS, *RUN],
}


def command_line(member: psutil.Process) -> str:
    """Empty if it has just ended: what starts also starts processes that live for a moment."""
    try:
        return " ".join(member.cmdline())
    except psutil.NoSuchProcess:
        return ""


def kill_and_see(process: Process, sent: signal.Signals = signal.SIGKILL) -> list[str]:
    """Kill the process that the user knows of; the command lines of all there were then."""
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    before = [command_line(member) for member in members]
    os.kill(process.pid, sent)
    process.wait()
    ends = time.monotonic() + LEFT_S
    while (left := process.members()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not left, [(member.pid, command_line(member)) for member in left]
    return before


def count(lines: list[str], word: str) -> int:
    return sum(word in line for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_in_a_step(tmp_path, name):
    with started(*python(*COMMANDS[name], f"run.dir={tmp_path}")) as process:
        process.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
        before = kill_and_see(process)
    ranks = 1 if name == "run" else 2
    # Each with a fork server and two workers that it has forked, which have its command line.
    assert count(before, "multiprocessing.forkserver") == 3 * ranks, before


def test_killed_in_a_save(tmp_path):
    always = ["train.save_every=1", f"run.dir={tmp_path}"]
    with started(*python(*COMMANDS["ranks"], *always)) as process:
        checkpoints = tmp_path / "run" / "checkpoints"
        process.wait_for(lambda: list(checkpoints.glob(".partial_*")))
        kill_and_see(process)


@pytest.mark.parametrize("name", ["ranks", "kd.torchrun"])
def test_killed_at_the_start(tmp_path, name):
    """As soon as there is a rank, and while ranks import, build models and start workers."""
    for delay_s in (0.0, 0.02, 0.3, 1.5, 3.0):
        with started(*python(*COMMANDS[name], f"run.dir={tmp_path / str(delay_s)}")) as process:
            process.wait_for(psutil.Process(process.pid).children)
            time.sleep(delay_s)
            kill_and_see(process)


def test_killed_while_workers_start(tmp_path):
    for delay_s in (0.0, 0.05, 0.5):
        command = [*COMMANDS["run"], f"run.dir={tmp_path / str(delay_s)}"]
        with started(*python(*command)) as process:
            process.wait_for(lambda: _fork_server(process))
            time.sleep(delay_s)
            kill_and_see(process)


def _fork_server(process: Process) -> bool:
    members = psutil.Process(process.pid).children()
    return any("multiprocessing.forkserver" in command_line(member) for member in members)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model") / "qwen3_vl"
    write("qwen3_vl", made)
    return made


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_of_two_ranks(folder, sent):
    options = [f"teacher.name={folder}", "parallel.nproc=2", "parallel.device=cpu", "serve.port=0"]
    with started(*python("-m", "kd.serve", *options)) as process:
        process.wait_for(lambda: "serving" in process.stdout)
        assert count(kill_and_see(process, sent), "kd.serve") == 3


def test_a_sweep_whose_points_are_jobs_on_this_machine(tmp_path):
    jobs = ["hydra/launcher=submitit_local", f"run.dir={tmp_path}"]
    with started(*python("-m", "kd.run", "-m", *RUN, *jobs)) as process:
        process.wait_for(lambda: list(tmp_path.rglob("metrics.jsonl")))
        assert count(kill_and_see(process), "submitit.core._submit") > 0


def test_a_job_of_a_cluster_outlives_who_has_submitted_it():
    program = "import kd; print('there')"
    env = environment(KD_PARENT_PID="999999999", SUBMITIT_EXECUTOR="slurm")
    with started(*python("-c", program), env=env) as process:
        assert process.wait() == 0 and process.stdout == "there\n"


def test_a_script_that_starts_a_run(tmp_path):
    """As scripts/quickstart.sh does."""
    script = 'export KD_PARENT_PID=$$\n"$@"\n'
    command = python(*COMMANDS["run"], f"run.dir={tmp_path}")
    with started("bash", "-c", script, "-", *command) as process:
        process.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
        kill_and_see(process)


ENDS_WITH = """
import sys, time
from kd import process
if "watch" in sys.argv:  # as where the kernel has no such signal
    process._signal_on_parents_death = lambda: False
if "poll" in sys.argv:
    del process.os.pidfd_open
process.end_with(int(sys.argv[1]))
print("there", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "how", [(), ("watch",), ("watch", "poll")], ids=["signal", "watch", "poll"]
)
@pytest.mark.parametrize("generation", ["child", "grandchild"])
def test_ways_to_notice(how, generation):
    """Of the parent, or of one before it. (A shell with a second command is not replaced.)"""
    script = '"$0" -c "$1" $$ "${@:2}"; true'
    if generation == "grandchild":
        script = f"parent=$$; ({script.replace('$$', '$parent')}); true"
    with started("bash", "-c", script, *python(ENDS_WITH, *how)) as process:
        process.wait_for(lambda: "there" in process.stdout)
        kill_and_see(process)


def test_a_parent_that_was_gone_before():
    with started("true") as gone:
        gone.wait()
    env = environment(KD_PARENT_PID=str(gone.pid))
    with started(*python("-c", "import kd, time; time.sleep(600)"), env=env) as process:
        wait_for(lambda: process.returncode is not None)
    assert process.returncode == -signal.SIGKILL


def test_a_parent_that_is_no_process_id():
    with started(*python("-c", "import kd"), env=environment(KD_PARENT_PID="me")) as process:
        assert process.wait() == 2
    assert process.stderr == "error: KD_PARENT_PID=me: give the id of a process, as $$\n"


def test_children_of_children_are_not_told():
    """The variable is for direct children: another host or a job has other processes."""
    program = "import kd, os; print(os.environ.get('KD_PARENT_PID'))"
    with started(*python("-c", program)) as process:
        assert process.wait() == 0
    assert process.stdout == "None\n"
