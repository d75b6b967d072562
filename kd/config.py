"""The root configs, what Hydra knows of them, and which combinations make no sense."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from kd.batching import (
    BatchingConfig,
    FixedBatching,
    PackedBatching,
    TokenBudgetBatching,
)
from kd.checkpoint import CheckpointConfig
from kd.data import (
    ConversationsConfig,
    DataConfig,
    DigitsConfig,
    MedPixConfig,
    MixtureConfig,
)
from kd.logger import DefaultLoggerConfig, LoggerConfig, WandbLoggerConfig
from kd.loss import (
    AlignedLossConfig,
    ForwardKLConfig,
    GOLDConfig,
    JSDConfig,
    LossConfig,
    ReverseKLConfig,
    ULDConfig,
)
from kd.model import PretrainedStudent, ScratchModel, TrainedModel
from kd.optim import OptimConfig
from kd.parallel import ParallelConfig
from kd.rollout import (
    DatasetRollout,
    HFEngineConfig,
    MixedRollout,
    RolloutConfig,
    StudentRollout,
    TeacherRollout,
    VllmEngineConfig,
)
from kd.rundir import RunConfig
from kd.teacher import (
    CachedTeacherConfig,
    KdServe,
    LocalTeacherConfig,
    NoTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
    VllmServe,
)
from kd.types import UserError


@dataclass
class TrainConfig:
    """How long, and what one optimizer step consists of."""

    max_steps: int = 100
    micro_batch_size: int | None = 1
    """Rows that one rank reads at once, with batching=fixed; None: all its rows of an optimizer
    step, or of `grad_accum` parts of it."""
    grad_accum: int | None = None
    """Micro-batches of so many rows per optimizer step; None: what `global_batch_size` leaves."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all ranks; None: what the other two give."""
    max_grad_norm: float = 1.0
    log_every: int = 1
    val_every: int | None = None
    """Validate after so many steps, and at the end; None: never."""
    save_every: int | None = None
    """Checkpoint after so many steps, and at the end; None: at the end only."""
    export: str = "last"
    """Which weights are exported: last, or best by checkpoint.best_metric."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for name in ("max_steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)}: must be at least 1")
        nullable = ("micro_batch_size", "grad_accum", "global_batch_size", "val_every")
        for name in (*nullable, "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name}={value}: must be at least 1, or null")
        if not self.max_grad_norm > 0:
            raise UserError(f"train.max_grad_norm={self.max_grad_norm}: must be above 0")
        if self.export not in ("last", "best"):
            raise UserError(f"train.export={self.export}: use last or best")

    def resolve(self, ranks: int) -> None:
        """Settle the three numbers of rows; refuse some that disagree."""
        if self.micro_batch_size is None:
            if self.global_batch_size is None:
                raise UserError(
                    "train.micro_batch_size=null reads all rows of a rank at once: give their "
                    "number, or train.global_batch_size"
                )
            parts = ranks * (self.grad_accum or 1)
            self.micro_batch_size = max(1, self.global_batch_size // parts)
        rows = self.micro_batch_size * ranks
        if self.grad_accum is None:
            self.grad_accum = max(1, (self.global_batch_size or rows) // rows)
        if self.global_batch_size is None:
            self.global_batch_size = rows * self.grad_accum
        if self.global_batch_size != rows * self.grad_accum:
            raise UserError(
                f"train.global_batch_size={self.global_batch_size} is not micro_batch_size "
                f"{self.micro_batch_size} x {ranks} ranks x grad_accum {self.grad_accum}: "
                "change one of them"
            )


@dataclass
class ValidationConfig:
    """What is measured on the validation split."""

    max_new_tokens: int = 64
    generate: bool = True
    """Answer the questions and compare with the reference; False: losses only."""
    batch_size: int = 16
    report_samples: int = 24
    """Answered rows that go to samples.jsonl, the report and wandb."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for name, least in {"max_new_tokens": 1, "batch_size": 1, "report_samples": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"validation.{name}={getattr(self, name)}: at least {least}")


class DoctorMode(Enum):
    """When the checks of `kd.doctor` run."""

    auto = "auto"
    only = "only"
    never = "never"


@dataclass
class VlmKDConfig:
    """Root of `recipes/vlm_kd.py`."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kd_ratio: float = 0.5
    """Share of the KD loss; 0: cross-entropy alone, and no teacher is asked; 1: KD alone."""
    student: TrainedModel = field(default_factory=TrainedModel)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    doctor: DoctorMode = DoctorMode.auto
    """Checks of data, models and teacher before the first step; only: and then end."""
    profile: bool = False
    """Record `profile_steps`: a trace, and a table of where their time went."""
    profile_steps: list[int] = field(default_factory=lambda: [3, 5])
    """The first and the last one, counted from 1 as in metrics.jsonl."""
    dry_run: bool = False
    """Check everything, count, print the plan, and end."""
    traceback: bool = False
    """Show a mistake's traceback as well as its plain words."""

    @property
    def asked_teacher(self) -> TeacherConfig:
        """The teacher that is loaded: there may be nothing to ask it."""
        asked = self.kd_ratio > 0 or self.rollout.teacher_responds
        return self.teacher if asked else NoTeacherConfig()


OPTIONS: dict[str, dict[str, type]] = {
    "student": {"pretrained": PretrainedStudent, "scratch": ScratchModel},
    "teacher": {
        "local": LocalTeacherConfig,
        "server": ServerTeacherConfig,
        "cached": CachedTeacherConfig,
        "none": NoTeacherConfig,
    },
    "teacher/engine": {"kd": KdServe, "vllm": VllmServe},
    "data": {
        "digits": DigitsConfig,
        "medpix": MedPixConfig,
        "conversations": ConversationsConfig,
        "mixture": MixtureConfig,
    },
    "batching": {
        "fixed": FixedBatching,
        "token_budget": TokenBudgetBatching,
        "packed": PackedBatching,
    },
    "loss": {
        "forward_kl": ForwardKLConfig,
        "reverse_kl": ReverseKLConfig,
        "jsd": JSDConfig,
        "uld": ULDConfig,
        "gold": GOLDConfig,
    },
    "rollout": {
        "dataset": DatasetRollout,
        "student": StudentRollout,
        "teacher": TeacherRollout,
        "mixed": MixedRollout,
    },
    "rollout/engine": {"hf": HFEngineConfig, "vllm": VllmEngineConfig},
    "parallel": {"fsdp": ParallelConfig},
    "optim": {"adamw": OptimConfig},
    "logger": {
        "jsonl": LoggerConfig,
        "default": DefaultLoggerConfig,
        "wandb": WandbLoggerConfig,
    },
}


def register() -> None:
    """Tell Hydra every option's schema, as `<option>_schema` in its group."""
    store = ConfigStore.instance()
    store.store(name="vlm_kd_schema", node=VlmKDConfig)
    for group, options in OPTIONS.items():
        for name, schema in options.items():
            store.store(group=group, name=f"{name}_schema", node=schema)


def to_object(config: DictConfig) -> VlmKDConfig:
    """The typed config. A key that no dataclass has is refused, also where `+` forced it in."""
    typed = typed_object(config)
    assert isinstance(typed, VlmKDConfig)
    return typed


def typed_object(config: DictConfig) -> Any:
    """The same, for any root config."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} has no value: give one, e.g. {missing[0]}=…")
    typed = OmegaConf.to_object(config)
    if not dataclasses.is_dataclass(typed):
        raise UserError("the defaults list of a root config begins with a schema: vlm_kd_schema")
    _refuse_unknown(config, typed, "")
    return typed


def _refuse_unknown(config: DictConfig, typed: Any, prefix: str) -> None:
    known = {f.name for f in dataclasses.fields(typed)}
    for key in config:
        if key not in known:
            raise UserError(
                f"unknown config key {prefix}{key}; known here: {', '.join(sorted(known))}"
            )
        child = getattr(typed, str(key))
        if dataclasses.is_dataclass(child):
            _refuse_unknown(config[key], child, f"{prefix}{key}.")
        for name, entry in child.items() if isinstance(child, dict) else ():
            if dataclasses.is_dataclass(entry):
                _refuse_unknown(config[key][name], entry, f"{prefix}{key}.{name}.")


def validate(config: VlmKDConfig) -> None:
    """Refuse what cannot work, with what to change. Settles the batch sizes."""
    for group, options in OPTIONS.items():
        if "/" not in group and type(getattr(config, group)) not in options.values():
            raise UserError(f"no {group} is chosen: give {group}=… or put it in the defaults list")
    validate_run(config)
    config.student.validate("student")
    config.teacher.validate("teacher")
    config.loss.validate()
    config.batching.validate(config.data.max_length)
    if not 0 <= config.kd_ratio <= 1:
        raise UserError(f"kd_ratio={config.kd_ratio}: must be in [0, 1]")
    has_teacher = not isinstance(config.teacher, NoTeacherConfig)
    if config.kd_ratio > 0 and not has_teacher:
        raise UserError(
            f"kd_ratio={config.kd_ratio} needs a teacher: choose one with teacher=…, or kd_ratio=0"
        )
    if config.rollout.teacher_responds and not has_teacher:
        raise UserError(
            "the rollouts are to be a teacher's, but there is none: choose one with teacher=…"
        )
    _validate_teacher(config)
    if config.rollout.least_student_share == 1 and config.kd_ratio < 1:
        raise UserError(
            f"kd_ratio={config.kd_ratio} asks for cross-entropy, but the student's own samples "
            "have no reference answer: set kd_ratio=1, or mix in others by rollout=mixed"
        )
    if config.rollout.student_share > 0 and config.kd_ratio == 0:
        raise UserError(
            "kd_ratio=0 leaves nothing to learn from the student's own samples: raise it, or "
            "choose rollout=dataset"
        )


class AnyRun(Protocol):
    """What the root configs of all recipes have."""

    run: RunConfig
    train: TrainConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    data: DataConfig
    rollout: RolloutConfig
    parallel: ParallelConfig
    optim: OptimConfig
    logger: LoggerConfig
    profile: bool
    profile_steps: list[int]
    traceback: bool


def validate_run(config: AnyRun) -> None:
    """Refuse what cannot work in any recipe. Settles the batch sizes."""
    config.run.validate()
    config.train.validate()
    config.validation.validate()
    config.checkpoint.validate()
    config.data.validate()
    config.rollout.validate()
    config.parallel.validate()
    config.optim.validate()
    config.logger.validate()
    for data in config.data.parts:
        if isinstance(data, ConversationsConfig) and not data.require_answer:
            _validate_unanswered(config, data)
    if config.train.export == "best" and config.checkpoint.best_metric is None:
        raise UserError("train.export=best needs checkpoint.best_metric")
    metric = config.checkpoint.best_metric
    if metric is not None and config.train.val_every is None:
        raise UserError("checkpoint.best_metric needs train.val_every")
    if metric is not None and "accuracy" in metric and not config.validation.generate:
        raise UserError(f"checkpoint.best_metric={metric} needs validation.generate=true")
    if config.optim.warmup_steps > config.train.max_steps:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} exceeds "
            f"train.max_steps={config.train.max_steps}"
        )
    _validate_profile(config)
    config.train.resolve(config.parallel.num_ranks())
    assert config.train.grad_accum is not None  # settled by resolve
    config.rollout.validate_window(
        config.train.micro_batch_size, config.train.grad_accum, config.data.max_length
    )


def _validate_profile(config: AnyRun) -> None:
    """Refuse steps that no run of so many has."""
    steps, max_steps = config.profile_steps, config.train.max_steps
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        raise UserError(
            f"profile_steps={steps}: give the first and the last step to record, such as [3,5]"
        )
    if config.profile and steps[1] > max_steps:
        raise UserError(
            f"profile_steps={steps}, but the run has train.max_steps={max_steps}: "
            "record earlier steps, or train for more"
        )


def _validate_unanswered(config: AnyRun, data: ConversationsConfig) -> None:
    """Refuse rows without an answer where one is needed."""
    if config.rollout.reads_answers:
        raise UserError(
            "data.require_answer=false allows rows without an answer, but this rollout option "
            "learns the data set's answers: choose rollout=student or rollout=teacher"
        )
    if config.train.val_every is not None and not data.has_own_validation:
        raise UserError(
            "data.require_answer=false leaves nothing to validate by: give rows with answers "
            "in data.validation_path (or validation_split), or set train.val_every=null"
        )


def _validate_teacher(config: VlmKDConfig) -> None:
    """Refuse a loss or rollouts that the teacher cannot serve."""
    teacher, loss = config.teacher, config.loss
    if config.rollout.teacher_responds and not teacher.can_respond:
        raise UserError(
            "this teacher does not generate: choose teacher=local (without teacher.offload), or "
            "another rollout option"
        )
    if teacher.needs_fixed_responses and config.kd_ratio > 0 and not config.rollout.is_fixed:
        raise UserError(
            "a cached teacher needs responses that come again, not ones that are generated: choose "
            "rollout=dataset, or teacher=local or server"
        )
    if config.kd_ratio == 0:
        return
    if not teacher.is_dense and isinstance(loss, AlignedLossConfig):
        raise UserError(
            "loss=uld and loss=gold need the teacher's whole distribution, but this teacher serves "
            "its top-k: have it serve hidden states, or choose another loss"
        )
    may_load_later = isinstance(teacher, CachedTeacherConfig) and not teacher.require_full
    if config.batching.packs and may_load_later:
        raise UserError(
            "batching=packed is tried on every model at the start, but the one behind a cache is "
            "loaded later: fill the cache (python -m kd.cache) and set teacher.require_full=true, "
            "or choose batching=token_budget"
        )
    fixed = teacher.temperature_fixed
    if fixed is not None and fixed != loss.temperature:
        raise UserError(
            f"the teacher's top-k log-probs are of temperature {fixed:g}, loss.temperature is "
            f"{loss.temperature:g}: they cannot be changed, set both alike"
        )
    if not teacher.keeps_tail and not isinstance(loss, ForwardKLConfig):
        raise UserError(
            "without the tail only loss=forward_kl can be taken of a top-k: the others need to "
            "know what the student does outside of it; keep the tail"
        )
