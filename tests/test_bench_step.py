"""The steps that scripts/bench_step.py compares are the same step."""

from __future__ import annotations

import argparse
import importlib.util

import pytest
import torch

from kd.parallel import ParallelConfig


@pytest.fixture(scope="module")
def script(repo):
    spec = importlib.util.spec_from_file_location("bench_step", repo / "scripts/bench_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_step_is_ours(script):
    args = argparse.Namespace(size="tiny", vocab=512, rows=2, length=8, kd_ratio=0.5)
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    losses = []
    try:
        for variant in (script.ours, script.whole_logits):
            case = script.make_case(args, world, torch.float64)
            step = script.make_step(variant(case), world)
            losses.append([step() for _ in range(3)])  # by the second on: of the gradients, too
    finally:
        world.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][0] > losses[0][2] > 0
