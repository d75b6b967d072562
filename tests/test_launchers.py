"""Where the points of a sweep run, and who chooses them."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from kd.stop import children
from tests.conftest import metrics
from tests.processes import python, started
from tests.test_run import SWEEP


def test_points_of_a_sweep_as_jobs_of_their_own(kd_main, tmp_path, capsys):
    """What a launcher makes of them on a cluster, here on this machine."""
    jobs = ["hydra/launcher=submitit_local", f"run.dir={tmp_path}", "doctor=never"]
    points = "optim.schedule=nonsense,constant"
    with pytest.raises(SystemExit) as exit_:
        kd_main("-m", "--config-name", "digits_teacher", *jobs, *SWEEP, points)
    assert exit_.value.code == 2
    assert "points of the sweep that failed: optim.schedule=nonsense" in capsys.readouterr().err
    good = tmp_path / "digits_teacher_sweep" / "optim.schedule=constant"
    assert json.loads((good / "status.json").read_text())["status"] == "finished"


def test_a_job_that_is_to_end_is_queued_again_and_goes_on(tmp_path):
    """By the signal that submitit has sent at the time limit; scripts/test_slurm.sh has ranks."""
    command = python("-m", "kd.run", "-m", "--config-name", "digits_teacher", *SWEEP)
    command += ["hydra/launcher=submitit_local", f"run.dir={tmp_path}", "doctor=never"]
    run = tmp_path / "digits_teacher_sweep"  # nothing is swept
    with started(*command, "train.max_steps=100") as process:
        process.wait_for((run / "metrics.jsonl").exists)
        (controller,) = (pid for pid in children(process.pid) if children(pid))
        (job,) = children(controller)
        os.kill(job, signal.SIGUSR2)
        assert process.wait() == 0, process.tail()
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert list(metrics(run, "train/loss")) == list(range(1, 101))
    (log,) = (run / ".submitit").glob("*/*_log.err")
    assert "Requeued job" in log.read_text()
    resumed = re.search(r"resuming \S+ after step (\d+)", log.read_text())
    assert resumed is not None and 0 < int(resumed[1]) < 100


def test_a_searching_sweeper_goes_by_the_best_metric(kd_main, tmp_path, capsys):
    """And is refused without one."""
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    points = ["optim.lr=choice(0.001,0.01)", f"run.dir={tmp_path}", "doctor=never"]
    command = ["-m", "--config-name", "digits_teacher", *SWEEP, *search, *points]
    with pytest.raises(SystemExit) as exit_:
        kd_main(*command)
    assert exit_.value.code == 2
    assert "this sweeper searches by checkpoint.best_metric" in capsys.readouterr().err
    validation = ["train.val_every=1", "validation.generate=false", "data.val_samples=10"]
    command = [x for x in command if x != "train.val_every=null"]
    kd_main(*command, *validation, "checkpoint.best_metric=val/loss")
    folder = tmp_path / "digits_teacher_sweep"
    found = OmegaConf.load(folder / "optimization_results.yaml")
    best = {
        path.name: min(metrics(path, "val/loss").values())
        for path in folder.iterdir()
        if path.is_dir()
    }
    name = min(best, key=lambda name: best[name])
    assert found.best_value == best[name]
    assert name == f"optim.lr={found.best_params['optim.lr']}"


def test_a_launcher_that_is_not_installed_names_its_extra(kd_main, monkeypatch, capsys):
    Plugins.instance()
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(launchers, "submitit_slurm.yaml")
    with pytest.raises(SystemExit) as exit_:
        kd_main("-m", "--config-name", "digits_teacher", "hydra/launcher=submitit_slurm")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        'error: hydra/launcher=submitit_slurm is not installed: pip install "kd-vlm[slurm]"\n'
    )
