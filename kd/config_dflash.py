"""The root config of `recipes/dflash.py`, and which combinations make no sense."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from kd.checkpoint import CheckpointConfig
from kd.config import OPTIONS, TrainConfig, ValidationConfig, validate_run
from kd.data import DataConfig, MixtureConfig
from kd.dflash import DecayWeighting, DPaceWeighting, DraftConfig, TargetConfig
from kd.logger import LoggerConfig
from kd.optim import OptimConfig
from kd.parallel import ParallelConfig
from kd.rollout import RolloutConfig
from kd.rundir import RunConfig
from kd.types import UserError


@dataclass
class DFlashConfig:
    """Root of `recipes/dflash.py`."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """teacher: the target responds; dataset: the answers are the target's own already."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    profile: bool = False
    """Record `profile_steps`: a trace, and a table of where their time went."""
    profile_steps: list[int] = field(default_factory=lambda: [3, 5])
    """The first and the last one, counted from 1 as in metrics.jsonl."""
    dry_run: bool = False
    """Check everything, count, print the plan, and end."""
    traceback: bool = False
    """Show a mistake's traceback as well as its plain words."""


DFLASH_OPTIONS: dict[str, dict[str, type]] = {
    "target": {"target": TargetConfig},
    "draft": {"dflash": DraftConfig},
    "draft/weighting": {"decay": DecayWeighting, "dpace": DPaceWeighting},
}


def register_dflash() -> None:
    """Tell Hydra the schemas that the other recipe does not have."""
    store = ConfigStore.instance()
    store.store(name="dflash_root_schema", node=DFlashConfig)
    for group, options in DFLASH_OPTIONS.items():
        for name, schema in options.items():
            store.store(group=group, name=f"{name}_schema", node=schema)


def validate_dflash(config: DFlashConfig) -> None:
    """Refuse what cannot work, with what to change. Settles the batch sizes."""
    for group in ("data", "rollout", "parallel", "optim", "logger"):
        if type(getattr(config, group)) not in OPTIONS[group].values():
            raise UserError(f"no {group} is chosen: give {group}=… or put it in the defaults list")
    validate_run(config)
    config.target.validate("target")
    config.draft.validate("draft")
    if isinstance(config.data, MixtureConfig):
        clashing = sorted({"image", "text"} & set(config.data.datasets))
        if clashing:
            raise UserError(
                f"data.datasets has the name {clashing[0]}, which val/accept_length_{clashing[0]} "
                "has another meaning for: rename it"
            )
    if config.rollout.student_share > 0:
        raise UserError(
            "a draft learns what its target says: choose rollout=teacher (the target responds), or "
            "rollout=dataset where the answers are the target's already"
        )
