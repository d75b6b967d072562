"""The option `teacher=cached`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from kd.model import ProcessorConfig, rendering_digest, tokenizer_digest
from kd.parallel import ParallelConfig, World
from kd.teacher.base import BaseTeacher, NoTeacherConfig, TeacherConfig
from kd.teacher.cached import CachedTeacher, Wanted, on_main
from kd.teacher.codec import DTYPES
from kd.types import UserError

log = logging.getLogger("kd")

CODECS = ("hidden", "topk")


@dataclass
class CachedTeacherConfig(TeacherConfig):
    """A folder with the targets of responses, and the teacher that fills it."""

    folder: str = "???"
    """Of one teacher, one codec and its settings; any number of runs may share it."""
    source: TeacherConfig = field(default_factory=TeacherConfig)
    codec: str = "hidden"
    """hidden: hidden states, and the head once, for every loss; topk: k log-probs and the tail."""
    dtype: str = "bfloat16"
    """Of hidden states: float32, bfloat16, float16, or float8 with a scale per token."""
    k: int = 128
    temperature: float = 1.0
    """Of the log-probs: ${loss.temperature}."""
    require_full: bool = False
    """True: a response that is not there ends the run, and the source is never loaded."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        super().validate(key)
        none = type(self.source) is TeacherConfig or isinstance(self.source, NoTeacherConfig)
        if none or isinstance(self.source, CachedTeacherConfig):
            raise UserError(f"{key}.source: choose one, e.g. teacher@{key}.source=local")
        self.source.validate(f"{key}.source")
        if self.source.alignment != "auto":
            raise UserError(f"{key}.source.alignment has no effect: set {key}.alignment")
        if self.codec not in CODECS:
            raise UserError(f"{key}.codec={self.codec}: use {' or '.join(CODECS)}")
        if self.codec == "hidden" and not self.source.is_dense:
            raise UserError(
                f"{key}.codec=hidden, but {key}.source serves a top-k: have it serve hidden "
                "states, or choose codec=topk"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"{key}.dtype={self.dtype}: use one of {', '.join(DTYPES)}")
        if self.k < 1 or not self.temperature > 0:
            raise UserError(
                f"{key}: k={self.k}, temperature={self.temperature}: give k of at least 1 and a "
                "temperature above 0"
            )

    @property
    def processor(self) -> ProcessorConfig:
        """The source's settings."""
        return self.source.processor  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def is_dense(self) -> bool:
        """See the base class."""
        return self.codec == "hidden"

    @property
    def temperature_fixed(self) -> float | None:
        """See the base class."""
        return None if self.is_dense or not self.keeps_tail else self.temperature

    @property
    def keeps_tail(self) -> bool:
        """See the base class."""
        return self.source.keeps_tail

    @property
    def needs_fixed_responses(self) -> bool:
        """See the base class."""
        return True

    @property
    def codec_settings(self) -> dict[str, Any]:
        """Those that the config decides."""
        if self.is_dense:
            return {"name": "hidden", "dtype": self.dtype}
        return {"name": "topk", "k": self.k, "temperature": self.temperature}

    def build_processor(self, corpus: Callable[[], list[str]]) -> ProcessorMixin | None:
        """The source's, without its weights."""
        return self.source.build_processor(corpus)

    def build_teacher(
        self,
        processor: ProcessorMixin | None,
        world: World,
        parallel: ParallelConfig,
        student_vocab: int,
    ) -> CachedTeacher:
        """Open the folder. The source is loaded when it is needed first. Collective."""
        assert processor is not None

        def build_source() -> BaseTeacher:
            if world.is_main:
                log.info("cache: the teacher that fills %s is loaded", self.folder)
            cuda = [world.device] if world.device.type == "cuda" else []
            # Loaded or not, and whenever: what a run draws at random stays the same.
            with torch.random.fork_rng(devices=cuda):
                return self.source.build_teacher(processor, world, parallel, student_vocab)

        reads = {
            "tokenizer": tokenizer_digest(processor),
            "rendering": rendering_digest(processor, self.processor.chat_template_kwargs),
        }
        identity = on_main(world, lambda: self.source.identity(parallel))
        wanted = Wanted(
            Path(self.folder),
            self.codec_settings,
            {**identity, **reads},
            student_vocab,
            processor.tokenizer.eos_token_id,
            self.keeps_tail,
        )
        return CachedTeacher(wanted, build_source, self.require_full, world)
