from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

from kd.logger import (
    CompositeLogger,
    DefaultLoggerConfig,
    LoggerConfig,
    NullLogger,
    WandbLoggerConfig,
)
from kd.logger.jsonl import JsonlLogger
from kd.types import UserError
from tests.processes import completed, python

OPTIONS = {"jsonl": LoggerConfig, "default": DefaultLoggerConfig, "wandb": WandbLoggerConfig}


def composed(repo: Path, option: str, *overrides: str) -> LoggerConfig:
    store = ConfigStore.instance()
    for name, schema in OPTIONS.items():
        store.store(group="logger", name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(repo / "configs"), version_base="1.3"):
        config = compose(overrides=[f"+logger={option}", *overrides])
    typed = OmegaConf.to_object(config.logger)
    assert isinstance(typed, LoggerConfig)
    return typed


@pytest.mark.parametrize("option", OPTIONS)
def test_yaml_holds_the_defaults_of_its_schema(repo, option):
    config = composed(repo, option)
    assert config == OPTIONS[option]()
    config.validate()


def test_every_yaml_is_known(repo):
    assert {p.stem for p in (repo / "configs" / "logger").iterdir()} == set(OPTIONS)


def test_unknown_key_is_refused(repo):
    with pytest.raises(HydraException, match="imagepx"):
        composed(repo, "default", "logger.imagepx=3")


@pytest.mark.parametrize("option", OPTIONS)
def test_metrics_file_is_always_written(tmp_path, option):
    config = OPTIONS[option]()
    if isinstance(config, WandbLoggerConfig):
        config.mode = "disabled"
    logger = config.build(tmp_path, rank=0)
    logger.start({}, 2, 0)
    logger.log(1, {"train/loss": 0.5})
    logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "train/loss": 0.5}


@pytest.mark.parametrize("option", OPTIONS)
def test_rollouts_reach_the_file_with_every_option(tmp_path, rollout, option):
    config = OPTIONS[option]()
    if isinstance(config, WandbLoggerConfig):
        config.mode = "disabled"
    logger = config.build(tmp_path, rank=0)
    logger.start({}, 2, 0)
    logger.rollouts(1, [rollout()])
    logger.close()
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert (line["step"], line["type"], line["id"]) == (1, "rollout", "row-1")


@pytest.mark.parametrize("option", OPTIONS)
def test_other_ranks_write_nothing(tmp_path, record, rollout, option):
    logger = OPTIONS[option]().build(tmp_path / "run", rank=1)
    assert isinstance(logger, NullLogger)
    logger.start({}, 2, 0)
    logger.log(1, {"train/loss": 0.5})
    logger.samples(1, [record()])
    logger.rollouts(1, [rollout()])
    logger.close(failed=True)
    assert not (tmp_path / "run").exists()


def test_composite_closes_all_although_one_fails(tmp_path):
    closed = []

    class Noting(NullLogger):
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def close(self, failed: bool = False) -> None:
            closed.append(failed)
            if self.fails:
                raise OSError("disk full")

    logger = CompositeLogger([Noting(False), Noting(True), JsonlLogger(tmp_path, 192)])
    with pytest.raises(OSError, match="disk full"):
        logger.close(failed=True)
    assert closed == [True, True]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LoggerConfig(image_px=0), "logger.image_px=0"),
        (WandbLoggerConfig(mode="onlin"), "logger.mode=onlin: use online, offline, disabled"),
        (WandbLoggerConfig(init_timeout_s=0), "init_timeout_s"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_values_out_of_range_are_refused_on_every_rank(tmp_path, config, names, rank):
    with pytest.raises(UserError, match=names.replace(".", r"\.")):
        config.build(tmp_path, rank)


def test_missing_wandb_names_the_extra(tmp_path, repo):
    """An installation that has everything but wandb, and a folder `wandb` left by earlier runs."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("wandb"):
            (site / entry.name).symlink_to(entry)
    (tmp_path / "wandb").mkdir()
    program = "from kd.logger import WandbLoggerConfig; WandbLoggerConfig().validate()"
    env = {**os.environ, "PYTHONPATH": f"{repo}{os.pathsep}{site}"}
    output = completed(*python("-S", "-c", program), env=env, cwd=tmp_path)
    last = output.stderr.splitlines()[-1]
    assert last.startswith("kd.types.UserError: ")
    assert 'pip install "kd-vlm[wandb]"' in last
