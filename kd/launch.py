"""What front doors share: ranks are started, and mistakes end in plain words.

A user's mistake ends in one or two plain lines and exit code 2.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from yaml import YAMLError

from kd.process import children_end_with_this
from kd.stop import EXIT_CODE, Stopped, pass_on_to_children
from kd.types import UserError

COMMAND_ERRORS = (HydraException, OmegaConfBaseException)

# Hydra keeps its hands off the file system: the run directory belongs to the recipe, and it must
# not depend on the clock, or ranks would disagree and a run could not be resumed.
HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def config_dir() -> str:
    """The shipped configs: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return str(inside if inside.is_dir() else Path(__file__).parents[1] / "configs")


# Options of Hydra's own groups that come with an extra of this package.
EXTRAS = {"hydra/launcher/submitit_": "slurm", "hydra/sweeper/optuna": "sweep"}


class PointFailed(Exception):
    """A point of a sweep has failed, and has said why; its text is the name of the point."""


class RanksFailed(Exception):
    """A rank that was started here ended with `exit_code`."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a rank ended with exit code {exit_code}")
        self.exit_code = exit_code

    @classmethod
    def of(cls, error: ChildFailedError) -> RanksFailed:
        """The rank that ended first; one killed by a signal ended with 1."""
        _, failure = error.get_first_failure()
        return cls(failure.exitcode if failure.exitcode > 0 else 1)


def launch_ranks(module: str, nproc: int, hydra_config: DictConfig, overrides: list[str]) -> None:
    """Start `nproc` ranks of `python -m module` on this machine and wait for them."""
    sources = [s.path for s in hydra_config.runtime.config_sources if s.provider == "command-line"]
    command = ["-m", module, "--config-name", hydra_config.job.config_name]
    command += [f"--config-dir={path}" for path in sources]
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"kd_{os.getpid()}",
        max_restarts=0,
        local_addr="localhost",
    )
    pass_on_to_children()
    try:
        with children_end_with_this():
            elastic_launch(settings, sys.executable)(*command, *overrides)
    except ChildFailedError as error:
        failure = RanksFailed.of(error)
        if failure.exit_code == EXIT_CODE:
            raise Stopped from None
        raise failure from None


def before_overrides(argv: list[str], settings: list[str]) -> list[str]:
    """The command line with more overrides; argparse wants all of them in one piece."""
    first = next((i for i, arg in enumerate(argv) if i and is_override(arg)), len(argv))
    return [*argv[:first], *settings, *argv[first:]]


def is_override(arg: str) -> bool:
    """Whether an argument is of the kind key=value."""
    return "=" in arg and not arg.startswith("-")


def quoted(value: str) -> str:
    """As the value of an override, whatever it holds."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def plain_words(error: Exception) -> str:
    """At most two lines; Hydra's own, made plainer."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    for option, extra in EXTRAS.items():
        if f"Could not find '{option}" in lines[0]:
            group, _, name = lines[0].split("'")[-2].rpartition("/")
            return f'{group}={name} is not installed: pip install "kd-vlm[{extra}]"'
    if lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        if "reference_type=Dict" in str(error.__cause__):  # whose keys are free
            return f"{key} has no such entry yet; with a + it is added: +{key}=…"
        return f"unknown config key {key}; --cfg job shows all keys"
    if lines[0].startswith("Cannot find primary config"):
        names = sorted({path.stem for path in Path(config_dir()).glob("*.yaml")} - {"serve"})
        return f"{lines[0].split('.')[0]}; shipped ones: {', '.join(names)}"
    if lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}: add -m to run every value, or quote a list as [a,b]"
    if lines[0].startswith("Error merging override") and error.__cause__ is not None:
        lines[1:] = str(error.__cause__).splitlines()
    if len(lines) > 2 and lines[1].startswith("Available options"):
        options = itertools.takewhile(lambda line: not line.startswith("Config search"), lines[2:])
        shown = (option for option in options if not option.endswith("_schema"))
        lines[1] += f" {', '.join(shown)}"
    return "\n".join(lines[:2])


def complain(error: Exception) -> None:
    """Say what is wrong, and on which rank."""
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    if rank != "0":  # which mostly has the same to say, and then ends all ranks
        time.sleep(2)
    print(f"{prefix}error: {plain_words(error)}", file=sys.stderr)


@contextmanager
def command_mistakes() -> Iterator[None]:
    """Around all of a command: what is wrong before there is a job ends it in plain words."""
    try:
        yield
    except (*COMMAND_ERRORS, YAMLError) as error:
        complain(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def job_mistakes(
    config: DictConfig | None = None, end: Callable[[int], NoReturn] = sys.exit
) -> Iterator[None]:
    """Around a job of `config`: what goes wrong for a known reason is said, and the job ended.

    `end` is called with the exit code, after a user's mistake or where a rank has failed.
    """
    try:
        yield
    except (UserError, *COMMAND_ERRORS) as error:
        if config is not None and config.get("traceback"):
            raise
        complain(error)
        end(2)
    except RanksFailed as failure:  # they have said why
        end(failure.exit_code)
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        complain(UserError("lost another rank, which ended first"))
        raise SystemExit(1) from None


def lost_rank(error: RuntimeError) -> bool:
    """Whether it is what a rank sees when another one has ended; that one has said why."""
    return any(words in str(error) for words in ("by peer", "remote process exited"))


def set_up_messages() -> None:
    """Our own messages on stderr, and none of the libraries' that say nothing to a user."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of Hydra's printer
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "torch.distributed", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Of a rank that fails, which has said why itself, or of a signal that is passed on.
    for noisy in ("multiprocessing", "agent.server"):
        logging.getLogger(f"torch.distributed.elastic.{noisy}.api").setLevel(logging.CRITICAL)
