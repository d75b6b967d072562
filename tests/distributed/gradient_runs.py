"""The gradients that the recipes hand to their optimizer, whole, and how they came together.

Started by torchrun; its arguments are a JSON file with `[name, config, overrides]` of each run, the
folder for what they find, and how many machines the ranks are to believe they are on.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers.utils import logging

from kd.config import VlmKDConfig, register, typed_object, validate
from kd.config_dflash import register_dflash, validate_dflash
from kd.parallel import HostWeights, ParallelConfig, World, local
from kd.run import config_dir
from kd.teacher.local import OffloadedTeacher
from recipes.dflash import DFlash
from recipes.vlm_kd import VlmKD

STEPS = 2


def recipe(name: str, overrides: list[str], world: World) -> VlmKD | DFlash:
    """Of a config, on these ranks."""
    register()
    register_dflash()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = typed_object(compose(name, overrides=overrides))
    if cfg.parallel.dp_replicate > 1:
        shape = cfg.parallel.dp_replicate, world.size // cfg.parallel.dp_replicate
        names = ("dp_replicate", "dp_shard")
        world = replace(world, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    if isinstance(cfg, VlmKDConfig):
        validate(cfg)
        return VlmKD(cfg, world)
    validate_dflash(cfg)
    return DFlash(cfg, world)


def gradients(made: VlmKD | DFlash) -> dict[str, Any]:
    """Of the first steps, before the optimizer makes its own; and the collectives of the last."""
    model = made.student if isinstance(made, VlmKD) else made.draft
    steps: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in held.items()}
        steps.append({name: grad.clone() for name, grad in whole.items()})

    made.optimizer.register_step_pre_hook(keep)
    away = isinstance(made, VlmKD) and isinstance(made.teacher, OffloadedTeacher)
    before = host_copies(made.teacher._weights) if away else []
    for step in range(STEPS):
        with CommDebugMode() as collectives:
            made.train_step()
        made.step = step + 1
        assert not away or host_copies(made.teacher._weights) == before
    made.source.close()
    counts = {str(op): count for op, count in collectives.get_comm_counts().items()}
    return {"steps": steps, "collectives": counts, "every": made.sync_every}


def host_copies(weights: HostWeights) -> list[tuple[int, bytes]]:
    """Where they are and what is in them, between two uses: nothing is on the device."""
    assert sum(device.nbytes() for _, device in weights._pairs) == 0
    assert sum(host.nbytes() for host, _ in weights._pairs) > 10_000
    assert all(local(p).untyped_storage().nbytes() == 0 for p in weights.module.parameters())
    return [(host.data_ptr(), bytes(host)) for host, _ in weights._pairs]


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    os.environ["LOCAL_WORLD_SIZE"] = str(world.size // int(sys.argv[3]))
    for name, config, overrides in json.loads(Path(sys.argv[1]).read_text()):
        found = gradients(recipe(config, overrides, world))
        if world.is_main:
            torch.save(found, Path(sys.argv[2]) / f"{name}.pt")
    world.close()


if __name__ == "__main__":
    main()
