"""Weights on their way to the servers: a Hugging Face folder in the run's directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from kd.parallel import DTYPES
from kd.rollout.engine import Policy


def write(folder: Path, state: dict[str, Tensor], policy: Policy, dtype: str) -> None:
    """Write a folder that is whole or absent."""
    target = DTYPES[dtype]
    # Each with memory of its own, or else a tied head is left out; and a server on a CPU, which
    # keeps a packed copy of its head, would go on with the head of the weights before.
    weights = {
        name: value.to(target if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    policy.vlm.model.save_pretrained(partial, state_dict=weights)
    policy.processor.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(partial / "config.json", file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def remove_others(folder: Path) -> None:
    """Remove the weights of other steps."""
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
