"""The front door: `python -m kd.run --config-name digits_kd [key=value …]`.

Composes the config, checks it, and launches: in this process, as one rank of a torchrun
job, or (parallel.nproc=N) by starting the ranks itself. A user's mistake ends in one or two plain
lines and exit code 2.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from yaml import YAMLError

from kd.config import VlmKDConfig, register, to_object, validate
from kd.types import UserError
from recipes import vlm_kd

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)

failed_points: list[str] = []

# Hydra keeps its hands off the file system: the run directory belongs to the recipe, and it must
# not depend on the clock, or ranks would disagree and a run could not be resumed.
HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.sweep.dir=${run.dir}/${run.name}_sweep",
    "hydra.sweep.subdir=.",
)
SWEEP_TABLE = (
    "+hydra.callbacks.summary={_target_:kd.sweep.SweepSummary,sweep_dir:'${hydra.sweep.dir}'}"
)


def config_dir() -> str:
    """The shipped configs: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return str(inside if inside.is_dir() else Path(__file__).parents[1] / "configs")


class RanksFailed(Exception):
    """A rank that was started here ended with `exit_code`."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a rank ended with exit code {exit_code}")
        self.exit_code = exit_code


def run(config: DictConfig) -> None:
    """One job: a single run, or one point of a sweep; a failed point does not end the sweep."""
    hydra_config = HydraConfig.get()
    try:
        run_job(config, hydra_config)
    except USER_ERRORS as error:
        if config.get("traceback"):
            raise
        complain(error)
        if hydra_config.mode != RunMode.MULTIRUN:
            raise SystemExit(2) from None
        failed_points.append(hydra_config.job.override_dirname)
    except RanksFailed as failure:  # they have said why
        if hydra_config.mode != RunMode.MULTIRUN:
            raise SystemExit(failure.exit_code) from None
        failed_points.append(hydra_config.job.override_dirname)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        complain(UserError(f"cannot write {error.filename or 'a file'}: {error.strerror}"))
        raise SystemExit(2) from None
    except RuntimeError as error:
        # What a rank sees when another one has ended; that one has said why.
        if not any(words in str(error) for words in ("by peer", "remote process exited")):
            raise
        complain(UserError("lost another rank, which ended first"))
        raise SystemExit(1) from None


def run_job(config: DictConfig, hydra_config: DictConfig) -> None:
    """Check the config and launch."""
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        name_sweep_point(config, hydra_config.job.override_dirname)
    typed = to_object(config)
    validate(typed)
    if typed.parallel.nproc > 1 and "RANK" not in os.environ and not typed.dry_run:
        launch_ranks(typed, hydra_config, [*overrides, f"run.name={typed.run.name}"])
    else:
        vlm_kd.main(typed, overrides)


def name_sweep_point(config: DictConfig, override_dirname: str) -> None:
    """Give each point of a sweep its own run directory, below `<run.name>_sweep`."""
    config.run.name = f"{config.run.name}_sweep/{override_dirname.replace('/', '.')}"


def launch_ranks(typed: VlmKDConfig, hydra_config: DictConfig, overrides: list[str]) -> None:
    """Start `parallel.nproc` ranks on this machine and wait for them."""
    sources = [s.path for s in hydra_config.runtime.config_sources if s.provider == "command-line"]
    command = ["-m", "kd.run", "--config-name", hydra_config.job.config_name]
    command += [f"--config-dir={path}" for path in sources]
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=typed.parallel.nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"kd_{os.getpid()}",
        max_restarts=0,
        local_addr="localhost",
    )
    try:
        elastic_launch(settings, sys.executable)(*command, *overrides)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise RanksFailed(failure.exitcode if failure.exitcode > 0 else 1) from None


def plain_words(error: Exception) -> str:
    """At most two lines; Hydra's own, made plainer."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        return f"unknown config key {key}; --cfg job shows all keys"
    if lines[0].startswith("Cannot find primary config"):
        names = sorted(path.stem for path in Path(config_dir()).glob("*.yaml"))
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


def with_settings(argv: list[str]) -> list[str]:
    """The command line with Hydra's settings; the points of a sweep are named by what is swept."""

    def is_override(arg: str) -> bool:
        return "=" in arg and not arg.startswith("-")

    parsed = OverridesParser.create().parse_overrides([a for a in argv[1:] if is_override(a)])
    fixed = ",".join(o.key_or_group for o in parsed if not o.is_sweep_override())
    settings = [*HYDRA_SETTINGS, f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"]
    if {"-m", "--multirun"} & set(argv):
        settings.append(SWEEP_TABLE)
    # argparse wants all overrides in one piece.
    first = next((i for i, arg in enumerate(argv) if i and is_override(arg)), len(argv))
    return [*argv[:first], *settings, *argv[first:]]


def main() -> None:
    """Compose, run, and turn mistakes into plain words."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of Hydra's printer
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "torch.distributed", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Of a rank that fails, which has said why itself.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    register()
    failed_points.clear()
    try:
        if len(sys.argv) == 1 or not any(arg.startswith("-") for arg in sys.argv[1:]):
            raise HydraException("name a config, e.g. --config-name digits_kd; --help says more")
        sys.argv[:] = with_settings(sys.argv)
        hydra.main(version_base="1.3", config_path=config_dir(), config_name=None)(run)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:  # before there was a job
        complain(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if failed_points:
        complain(UserError(f"points of the sweep that failed: {', '.join(failed_points)}"))
        raise SystemExit(2)


if __name__ == "__main__":
    main()
