"""Runs of the recipe, one after another on the ranks of one launch: starting them takes longest.

Started by torchrun; its one argument is a JSON file with a list of the overrides of each run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from transformers.utils import logging

from kd.config import register, to_object, validate
from kd.parallel import ParallelConfig
from kd.run import config_dir
from kd.rundir import RunDir
from recipes.vlm_kd import VlmKD


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    register()
    world = ParallelConfig(device="cpu", cpu_threads=1).build()
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        with initialize_config_dir(config_dir(), version_base="1.3"):
            cfg = to_object(compose("qwen_vl_kd", overrides=overrides))
        validate(cfg)
        run_dir = RunDir(cfg.run.path, world)
        run_dir.open(dataclasses.asdict(cfg), overrides, cfg.run.resume)
        VlmKD(cfg, world).train(run_dir)
    world.close()


if __name__ == "__main__":
    main()
