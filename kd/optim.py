"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kd.types import UserError

SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with warm-up and decay."""

    lr: float = 5e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only: not to norms, biases and other vectors."""
    warmup_steps: int = 0
    schedule: str = "cosine"
    """cosine, linear or constant after the warm-up."""
    min_lr_ratio: float = 0.0
    """The last step's share of `lr`."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule={self.schedule}: use one of {', '.join(SCHEDULES)}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.lr={self.lr}: must be above 0, and finite")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas}: give two numbers in [0, 1)")
        if not self.eps > 0:
            raise UserError(f"optim.eps={self.eps}: must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"optim.weight_decay={self.weight_decay}: must be 0 or more, and finite"
            )
        if self.warmup_steps < 0:
            raise UserError(f"optim.warmup_steps={self.warmup_steps}: must not be negative")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio={self.min_lr_ratio}: must be in [0, 1]")

    def build(self, model: nn.Module, max_steps: int) -> tuple[Optimizer, LambdaLR]:
        """Optimizer over the trainable parameters, and its schedule."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=trained[0].device.type != "meta",  # no temporaries as large as the weights
        )
        return optimizer, LambdaLR(optimizer, self.lr_factor(max_steps))

    def lr_factor(self, max_steps: int) -> Callable[[int], float]:
        """The share of `lr` that step 0, 1, … trains with; the first is above 0."""
        decay_steps = max(1, max_steps - self.warmup_steps)
        shapes: dict[str, Callable[[float], float]] = {
            "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
            "linear": lambda x: 1 - x,
            "constant": lambda x: 1.0,
        }
        shape, floor = shapes[self.schedule], self.min_lr_ratio

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = min(1.0, (step - self.warmup_steps) / decay_steps)
            return floor + (1 - floor) * shape(progress)

        return factor


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of what is trained to `max_norm`; returns the norm before. Collective."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        # A tower that saw no image: an absent gradient would leave a hole in the optimizer's state,
        # which then could not be resumed, and would differ from other ranks' zeros.
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
