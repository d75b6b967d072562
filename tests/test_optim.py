from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kd.optim import OptimConfig


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.5 * (1 + math.cos(math.pi / 2))), ("linear", 0.5)]
)
def test_schedule(schedule, middle):
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule=schedule, min_lr_ratio=0.2)
    factor = config.lr_factor(max_steps=110)
    assert factor(0) == pytest.approx(0.1)  # the first step trains, too
    assert factor(9) == 1
    assert factor(10) == 1
    assert factor(60) == pytest.approx(0.2 + 0.8 * middle)
    assert factor(110) == pytest.approx(0.2)
    assert all(factor(i) >= factor(i + 1) for i in range(10, 110))


def test_constant_without_warmup():
    factor = OptimConfig(schedule="constant").lr_factor(max_steps=5)
    assert [factor(i) for i in range(5)] == [1.0] * 5


def test_only_trained_matrices_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 4))
    model[2].requires_grad_(False)
    optimizer, scheduler = OptimConfig(lr=0.5, weight_decay=0.1, warmup_steps=2).build(model, 10)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decay == {
        id(model[0].weight): 0.1,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }
    assert scheduler.get_last_lr()[0] == 0.25


def test_one_step_is_adamw_of_the_paper():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    before = model.weight.detach().clone()
    config = OptimConfig(lr=0.1, betas=[0.9, 0.99], weight_decay=0.3, schedule="constant")
    optimizer, _ = config.build(model, 1)
    gradient = torch.randn_like(before)
    model.weight.grad = gradient.clone()
    optimizer.step()
    # Bias-corrected moments of the first step are the gradient and its square.
    expected = before * (1 - 0.1 * 0.3) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_a_step_needs_no_memory_of_its_own():
    model = nn.Linear(300, 200)
    optimizer, _ = OptimConfig().build(model, 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the moments
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    assert max(op.self_cpu_memory_usage for op in profile.key_averages()) < model.weight.nbytes
