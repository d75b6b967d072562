"""The front door: `python -m kd.run --config-name digits_kd [key=value …]`.

Composes the config, checks it, and launches: in this process, as one rank of a torchrun
job, or (parallel.nproc=N) by starting the ranks itself. A user's mistake ends in one or two plain
lines and exit code 2.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from kd.checkpoint import CheckpointConfig
from kd.config import VlmKDConfig, register, typed_object, validate
from kd.config_dflash import DFlashConfig, register_dflash, validate_dflash
from kd.launch import (
    HYDRA_SETTINGS,
    PointFailed,
    before_overrides,
    command_mistakes,
    complain,
    config_dir,
    is_override,
    job_mistakes,
    launch_ranks,
    quoted,
    set_up_messages,
)
from kd.logger.read import read_metrics
from kd.process import children_end_with_this
from kd.stop import Stopped, requeue, stop_request
from kd.types import UserError
from recipes import dflash, vlm_kd

RECIPES = {
    VlmKDConfig: (validate, vlm_kd.main),
    DFlashConfig: (validate_dflash, dflash.main),
}
"""By the root config that heads the defaults list."""

failed_points: list[str] = []

SWEEP_SETTINGS = (
    "hydra.sweep.dir=${run.dir}/${run.name}_sweep",
    "hydra.sweep.subdir=.",
)
SWEEP_TABLE = (
    "+hydra.callbacks.summary={_target_:kd.sweep.SweepSummary,sweep_dir:'${hydra.sweep.dir}'}"
)


def run(config: DictConfig) -> float | None:
    """One job: a single run, or one point of a sweep, in this process or in that of a launcher.

    Returns what a sweeper that searches goes by.
    """
    set_up_messages()
    hydra_config = HydraConfig.get()
    with job_mistakes(config, functools.partial(end_job, hydra_config)):
        try:
            return run_job(config, hydra_config)
        except Stopped:
            requeue()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            complain(UserError(f"cannot write {error.filename or 'a file'}: {error.strerror}"))
            raise SystemExit(2) from None


def end_job(hydra_config: DictConfig, exit_code: int) -> NoReturn:
    """After what went wrong has been said; the other points of a sweep go on."""
    if hydra_config.mode != RunMode.MULTIRUN:
        raise SystemExit(exit_code) from None
    point = hydra_config.job.override_dirname
    failed_points.append(point)
    raise PointFailed(point) from None


def run_job(config: DictConfig, hydra_config: DictConfig) -> float | None:
    """Check the config and launch."""
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        name_sweep_point(config, hydra_config.job.override_dirname)
    typed = checked(config)
    _, recipe = RECIPES[type(typed)]
    if searches(hydra_config) and typed.checkpoint.best_metric is None:
        raise UserError(
            "this sweeper searches by checkpoint.best_metric: name one, e.g. "
            "checkpoint.best_metric=val/loss"
        )
    if typed.parallel.nproc > 1 and "RANK" not in os.environ and not typed.dry_run:
        named = [*overrides, f"run.name={quoted(typed.run.name)}"]
        launch_ranks("kd.run", typed.parallel.nproc, hydra_config, named)
    else:
        stop_request.listen()
        recipe(typed, overrides)
    return best_value(typed.checkpoint, typed.run.path)


def searches(hydra_config: DictConfig) -> bool:
    """Whether the points of a sweep depend on how earlier ones came out."""
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    return is_sweep and hydra_config.runtime.choices["hydra/sweeper"] != "basic"


def best_value(config: CheckpointConfig, run_dir: Path) -> float | None:
    """The best value of `best_metric` that the run has logged; None: there is none."""
    points = read_metrics(run_dir).get(config.best_metric or "", [])
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return None
    return min(values) if config.best_mode == "min" else max(values)


def checked(config: DictConfig) -> Any:
    """The typed config of either recipe, validated."""
    typed = typed_object(config)
    if type(typed) not in RECIPES:
        raise UserError("this config is none of a recipe: its defaults list begins otherwise")
    check, _ = RECIPES[type(typed)]
    check(typed)
    return typed


def name_sweep_point(config: DictConfig, override_dirname: str) -> None:
    """Give each point of a sweep its own run directory, below `<run.name>_sweep`."""
    config.run.name = f"{config.run.name}_sweep/{override_dirname.replace('/', '.')}"


def with_settings(argv: list[str]) -> list[str]:
    """The command line with Hydra's settings; the points of a sweep are named by what is swept."""
    parsed = OverridesParser.create().parse_overrides([a for a in argv[1:] if is_override(a)])
    fixed = ",".join(o.key_or_group for o in parsed if not o.is_sweep_override())
    settings = [*HYDRA_SETTINGS, *SWEEP_SETTINGS]
    settings.append(f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]")
    if {"-m", "--multirun"} & set(argv):
        settings.append(SWEEP_TABLE)
    return before_overrides(argv, settings)


def main() -> None:
    """Compose, run, and turn mistakes into plain words."""
    set_up_messages()
    register()
    register_dflash()
    failed_points.clear()
    try:
        with command_mistakes(), children_end_with_this():
            if len(sys.argv) == 1 or not any(arg.startswith("-") for arg in sys.argv[1:]):
                raise HydraException(
                    "name a config, e.g. --config-name digits_kd; --help says more"
                )
            sys.argv[:] = with_settings(sys.argv)
            hydra.main(version_base="1.3", config_path=config_dir(), config_name=None)(run)()
    except PointFailed as failure:
        if not failed_points:  # it was in another process
            failed_points.append(str(failure))
    except Exception as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        complain(UserError(f"a job of the sweep has ended without a result\n{error}"))
        raise SystemExit(1) from None
    if failed_points:
        complain(UserError(f"points of the sweep that failed: {', '.join(failed_points)}"))
        raise SystemExit(2)


if __name__ == "__main__":
    main()
