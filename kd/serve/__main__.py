"""The front door: `python -m kd.serve teacher.name=FOLDER [key=value …]`.

In one process, as one rank of a torchrun job, or (parallel.nproc=N) by starting the ranks itself.
A user's mistake ends in one or two plain lines and exit code 2.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing import SignalException
from yaml import YAMLError

from kd.config import register as register_groups
from kd.config import typed_object
from kd.launch import (
    HYDRA_SETTINGS,
    USER_ERRORS,
    RanksFailed,
    before_overrides,
    complain,
    config_dir,
    launch_ranks,
    lost_rank,
    set_up_messages,
)
from kd.serve.config import ServerConfig, register
from kd.types import UserError

EXTRA = ("fastapi", "uvicorn", "prometheus-client", "pydantic")


def run(config: DictConfig) -> None:
    """Check the config, and serve or start the ranks that do."""
    try:
        check_extra()
        typed = typed_object(config)
        if not isinstance(typed, ServerConfig):
            raise UserError("the defaults list of this config does not begin with serve_schema")
        typed.validate()
        if typed.parallel.nproc > 1 and "RANK" not in os.environ:
            hydra_config = HydraConfig.get()
            overrides = list(hydra_config.overrides.task)
            launch_ranks("kd.serve", typed.parallel.nproc, hydra_config, overrides)
        else:
            from kd.serve.server import run_rank  # needs what has just been checked

            run_rank(typed)
    except USER_ERRORS as error:
        if config.get("traceback"):
            raise
        complain(error)
        raise SystemExit(2) from None
    except RanksFailed as failure:  # they have said why
        raise SystemExit(failure.exit_code) from None
    except SignalException:  # passed on to the ranks, which have ended by it
        return
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        complain(UserError("lost another rank, which ended first"))
        raise SystemExit(1) from None


def check_extra() -> None:
    """Raise UserError where the packages of the extra `serve` are not installed."""
    for name in EXTRA:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise UserError(
                f'kd.serve needs the package {name}: pip install "kd-vlm[serve]"'
            ) from None


def main() -> None:
    """Compose, serve, and turn mistakes into plain words."""
    set_up_messages()
    register_groups()
    register()
    try:
        if {"-m", "--multirun"} & set(sys.argv):
            raise UserError("one server serves one model: leave out --multirun")
        sys.argv[:] = before_overrides(sys.argv, list(HYDRA_SETTINGS))
        hydra.main(version_base="1.3", config_path=config_dir(), config_name="serve")(run)()
    except (*USER_ERRORS, YAMLError) as error:  # before there was a config
        complain(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
