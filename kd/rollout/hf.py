"""The `hf` engine: the model of the policy itself generates, on the ranks it is trained on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from kd.model import cut
from kd.rollout.engine import Engine, EngineConfig, Policy, Sampling
from kd.rollout.sampling import Draw, uniforms
from kd.types import Rollout, Sample, UserError


@dataclass
class HFEngineConfig(EngineConfig):
    """`generate` of transformers, with a KV cache."""

    token_budget: int = 32768
    """Tokens of prompts and responses, padding included, that are in the KV cache at once."""
    gather: bool = True
    """Hold all weights on every rank while generating, in compute precision. False: gather them
    block by block for every token, in lockstep over the ranks: slow, for models that do not fit."""

    def validate(self, key: str) -> None:
        """Refuse values out of range."""
        if self.token_budget < 1:
            raise UserError(f"{key}.token_budget={self.token_budget}: must be at least 1")

    @property
    def is_remote(self) -> bool:
        """It runs where training does."""
        return False

    def build(self, policy: Policy) -> Engine:
        """See the base class."""
        return HFEngine(policy, self)


class HFEngine:
    """Generates sorted by length, in batches of a token budget."""

    def __init__(self, policy: Policy, config: HFEngineConfig) -> None:
        self.policy, self.config = policy, config
        self.policy_step = 0

    def sync(self, step: int) -> None:
        """The weights are the model's own: only the step is noted."""
        self.policy_step = step

    def close(self) -> None:
        """Nothing is held."""

    def generate(
        self, prompts: list[Sample], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[Rollout]:
        """See `Engine`. Collective, with any number of prompts on each rank."""
        vlm, world = self.policy.vlm, self.policy.world
        rows = [row for row in range(len(prompts)) for _ in range(n)]
        uniforms_RT = uniforms(seeds, n, sampling.max_new_tokens)
        batches = self._batches(prompts, n, sampling.max_new_tokens)
        if not self.config.gather:  # every forward is a collective: as many on every rank
            batches += [[]] * (max(world.gather(len(batches))) - len(batches))
        responses: dict[int, tuple[list[int], bool]] = {}
        training = vlm.training
        vlm.eval()
        with vlm.gathered() if self.config.gather else contextlib.nullcontext():
            for batch in batches:
                samples = [prompts[rows[i]] for i in batch]
                found = self._generate(samples, uniforms_RT[batch], sampling)
                responses |= dict(zip(batch, found, strict=True))
        vlm.train(training)
        return [
            Rollout(prompts[row], *responses[i], self.policy_step) for i, row in enumerate(rows)
        ]

    def _batches(self, prompts: list[Sample], n: int, max_new_tokens: int) -> list[list[int]]:
        """Numbers of rollouts, longest first; those of a batch pad to the budget at most."""
        lengths = [
            self.policy.prompts([sample], filler=False).input_ids_BS.shape[1] for sample in prompts
        ]
        order = sorted(range(len(prompts) * n), key=lambda i: -lengths[i // n])
        batches: list[list[int]] = []
        room = 0
        for i in order:
            if room < 1:
                batches.append([])
                room = max(1, self.config.token_budget // (lengths[i // n] + max_new_tokens))
            batches[-1].append(i)
            room -= 1
        return batches

    def _generate(
        self, samples: list[Sample], uniforms_BT: torch.Tensor, sampling: Sampling
    ) -> list[tuple[list[int], bool]]:
        policy = self.policy
        prompts = policy.prompts(samples, filler=not self.config.gather)
        prompts = prompts.to(policy.world.device)
        draw = None
        if sampling.temperature > 0:
            u_BT = uniforms_BT.to(policy.world.device)
            draw = Draw(sampling, u_BT, prompts.input_ids_BS.shape[1], policy.stop_ids[0])
        ids = policy.vlm.generate(
            prompts, sampling.max_new_tokens, policy.stop_ids, policy.forbidden_ids, draw
        )
        return cut(ids[: len(samples)], policy.stop_ids)
