"""What generates: the interface of the engines, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import ProcessorMixin

from kd.model import VLM
from kd.parallel import World
from kd.types import Inputs, Rollout, Sample, UserError


@dataclass
class Sampling:
    """How tokens are drawn. The loss has a temperature of its own."""

    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """Of the most likely tokens, those that together have this probability; 1: all."""
    top_k: int = 0
    """The so many most likely tokens; 0: all."""
    max_new_tokens: int = 128
    """A response that reaches it is cut, gets no EOS, and is counted in rollout/truncated."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if self.temperature < 0:
            raise UserError(f"{key}.temperature={self.temperature}: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"{key}.top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"{key}.top_k={self.top_k}: 0 (all tokens) or more")
        if self.max_new_tokens < 1:
            raise UserError(f"{key}.max_new_tokens={self.max_new_tokens}: must be at least 1")


@dataclass
class Policy:
    """A model that responds to prompts, and how it reads them."""

    vlm: VLM
    processor: ProcessorMixin
    prompts: Callable[..., Inputs]
    """`(samples, filler=True)` -> left-padded inputs (CPU); a filler row may come last, for ranks
    whose forwards are collectives."""
    stop_ids: list[int]
    """Any of them ends a response; the first is the EOS of reference answers."""
    forbidden_ids: list[int]
    """Tokens that are never sampled: placeholders of images, and entries that pad the head."""
    world: World
    max_length: int
    """Tokens of prompt + response, at most."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path("runs")
    """The run's directory, which a server can read from."""


class Engine(Protocol):
    """Generates responses with some weights of a policy."""

    def generate(
        self, prompts: list[Sample], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[Rollout]:
        """`n` rollouts of each prompt: those of prompts[0], then those of prompts[1], …

        A prompt and its seed (one per prompt, 0 <= seed < 2**31) settle its rollouts, whatever else
        is generated with them. `policy_step` of each is that of the last `sync`.
        """
        ...

    def sync(self, step: int) -> None:
        """Take over the weights after optimizer step `step`. Collective: call it on every rank."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@dataclass
class EngineConfig:
    """Base of the `rollout/engine` options."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""

    @property
    def is_remote(self) -> bool:
        """Whether it generates elsewhere: needs no lockstep, and can run beside training."""
        raise NotImplementedError

    def build(self, policy: Policy) -> Engine:
        """The engine. Collective. Raises UserError on every rank where it cannot work."""
        raise NotImplementedError
