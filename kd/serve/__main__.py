"""The front door: `python -m kd.serve teacher.name=FOLDER [key=value …]`.

In one process, as one rank of a torchrun job, or (parallel.nproc=N) by starting the ranks itself.
A user's mistake ends in one or two plain lines and exit code 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing import SignalException

from kd.config import register as register_groups
from kd.config import typed_object
from kd.launch import (
    HYDRA_SETTINGS,
    before_overrides,
    command_mistakes,
    config_dir,
    job_mistakes,
    launch_ranks,
    set_up_messages,
)
from kd.serve.config import ServerConfig, register
from kd.types import UserError

EXTRA = ("fastapi", "uvicorn", "prometheus-client", "pydantic")


def run(config: DictConfig) -> None:
    """One job, and how it ends."""
    with job_mistakes(config), contextlib.suppress(SignalException):  # the ranks have ended by it
        run_job(config)


def run_job(config: DictConfig) -> None:
    """Check the config, and serve or start the ranks that do."""
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
    with command_mistakes():
        if {"-m", "--multirun"} & set(sys.argv):
            raise HydraException("one server serves one model: leave out --multirun")
        sys.argv[:] = before_overrides(sys.argv, list(HYDRA_SETTINGS))
        hydra.main(version_base="1.3", config_path=config_dir(), config_name="serve")(run)()


if __name__ == "__main__":
    main()
