"""Fill the cache of `teacher=cached` before the runs that read it, or look it over.

    python -m kd.cache --config-name digits_kd teacher=cached teacher@teacher.source=digits
    python -m kd.cache --config-name digits_kd teacher=cached teacher@teacher.source=digits --verify

The settings are those of the run; under torchrun, or with parallel.nproc=N, the rows are shared
among the ranks. Rows that are there are left alone: what was stopped goes on by the same command.
`--verify` reads all files and compares some rows with the teacher; exit code 1 where a file is
damaged.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kd.config import VlmKDConfig, register, to_object, validate
from kd.data import Rows, Split, sizes_of, validation_batches
from kd.data.sampler import ValidationSampler
from kd.launch import (
    HYDRA_SETTINGS,
    before_overrides,
    command_mistakes,
    config_dir,
    job_mistakes,
    launch_ranks,
    set_up_messages,
)
from kd.model import VLM
from kd.parallel import World
from kd.rollout import Rejections
from kd.teacher import CachedTeacherConfig
from kd.teacher.cache import SEGMENTS, told
from kd.teacher.manifest import read_manifest
from kd.teacher.store import damage, segment_paths
from kd.types import Batch, UserError
from recipes.vlm_kd import VlmKD

log = logging.getLogger("kd")

VERIFY = "--verify"
COMPARED_ROWS = 64
"""Spread over the data, at least so many."""
BATCHES_AT_ONCE = 8
TOLD_EVERY_S = 10.0


class Filler(VlmKD):
    """The recipe as far as the teacher's targets go: the student has no weights."""

    def __init__(self, cfg: VlmKDConfig, world: World) -> None:
        assert isinstance(cfg.teacher, CachedTeacherConfig)
        self.cfg, self.world, self.device = cfg, world, world.device
        self.processor = cfg.student.build_processor(cfg.data.corpus)
        self.teacher_processor = cfg.teacher.build_processor(cfg.data.corpus)
        self.pairing = self.build_pairing()
        splits = ["train", *(["validation"] if cfg.train.val_every else [])]
        self.splits: list[Rows] = [cfg.data.build(split) for split in splits]
        with torch.device("meta"):
            model = cfg.student.build(self.processor, with_weights=False)
        self.student = VLM(model)
        self.teacher = cfg.teacher.build_teacher(
            self.teacher_processor, world, cfg.parallel, model.get_output_embeddings().out_features
        )
        self.collator = self.build_collator()
        self.split = Split(cfg.train.micro_batch_size, world.rank, world.size)
        self.num_rows = sum(len(rows) for rows in self.splits)
        self.num_batches = sum(
            len(ValidationSampler(sizes_of(rows), self.split)) for rows in self.splits
        )

    def batches(self) -> Iterator[Batch]:
        """Every row of the splits once over all ranks, and as many batches on each of them."""
        cfg, world = self.cfg, self.world
        rejections = Rejections(cfg.data.on_broken_row)
        for rows in self.splits:
            for batch in validation_batches(
                rows,
                self.collator,
                self.split,
                num_workers=cfg.data.workers(self.device),
                pin_memory=self.device.type == "cuda",
            ):
                problem = None
                try:
                    rejections.note(batch.rejected)
                except UserError as error:
                    problem = str(error)
                if world.sum_ints(problem is not None)[0]:
                    world.agree(problem)
                yield batch

    def fill(self) -> None:
        """Have every row in the cache."""
        progress, batches = Progress(self.num_rows), self.batches()
        # Several at once: one swap of an offloaded teacher, and many requests to a server.
        while group := list(itertools.islice(batches, BATCHES_AT_ONCE)):
            self.teacher.fill(group)
            if self.world.is_main:
                progress.tell(len(group) * self.split.stride)
        found = self.teacher.metrics()
        if self.world.is_main:
            log.info(
                "cache: %s holds %s rows; %.1f %% of this data's were there before",
                *(self.teacher.wanted.folder, f"{found['cache/rows']:,}"),
                100 * found["cache/hit_rate"],
            )

    def verify(self) -> dict[str, str]:
        """What is in the cache of this data, and how true it is. Collective."""
        teacher, world = self.teacher, self.world
        assert teacher.cache is not None
        cache, num_asked, num_found = teacher.cache, 0, 0
        divergences: list[Tensor] = []
        num_compared = -(-COMPARED_ROWS // self.split.stride)
        for number, batch in enumerate(self.batches()):
            responses = told(batch)
            num_asked += len(responses)
            num_found += sum(response.key in cache.store for response in responses)
            if number % max(1, self.num_batches // num_compared) == 0:
                divergences.append(teacher.compare(batch))
        num_asked, num_found = world.sum_ints(num_asked, num_found)
        kl_N = np.concatenate([kl.numpy() for rank in world.gather(divergences) for kl in rank])
        on_disk = sum(path.stat().st_size for path in segment_paths(cache.store.folder))
        codec = ", ".join(str(value) for value in cache.manifest.codec.values())
        return {
            "codec": codec,
            "rows of the data that are there": f"{num_found:,} of {num_asked:,}",
            "hit rate": f"{num_found / max(1, num_asked):.4f}",
            "rows in all": f"{len(cache.store):,}",
            "size of the segments": f"{on_disk / 2**20:,.1f} MiB",
            "bytes per token": f"{cache.codec.token_bytes}",
            "tokens compared with the teacher": f"{len(kl_N):,}",
            "KL(teacher || kept), mean": f"{kl_N.mean():.2e}",
            "KL(teacher || kept), 99th percentile": f"{np.quantile(kl_N, 0.99):.2e}",
        }


class Progress:
    """Says now and then how far it is, and how long the rest takes at this pace."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.told = time.monotonic()

    def tell(self, rows: int) -> None:
        """So many more rows are done, at most."""
        self.done = min(self.total, self.done + rows)
        now = time.monotonic()
        if now - self.told < TOLD_EVERY_S:
            return
        self.told = now
        pace = self.done / (now - self.began)
        left_s = (self.total - self.done) / pace
        left = f"{left_s / 60:.0f} min" if left_s >= 120 else f"{left_s:.0f} s"
        log.info("cache: %s", f"{self.done:,} of {self.total:,} rows, {pace:.1f}/s, {left} left")


def run_rank(cfg: VlmKDConfig, verify: bool) -> None:
    """Fill or verify in this process, as one of its ranks."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    world = cfg.parallel.build()
    try:
        if verify:
            look_over(cfg, world)
        else:
            filler = Filler(cfg, world)
            try:
                filler.fill()
            finally:
                filler.teacher.close()
    except BaseException:
        if world.size == 1:  # with more, closing may wait for ranks that never come
            world.close()
        raise
    world.close()


def look_over(cfg: VlmKDConfig, world: World) -> None:
    """Print what there is to say of the cache; exit code 1 where a file is damaged."""
    assert isinstance(cfg.teacher, CachedTeacherConfig)
    folder = Path(cfg.teacher.folder)
    if read_manifest(folder) is None:
        raise UserError(
            f"there is no cache in {folder}: the same command without {VERIFY} fills it"
        )
    paths = segment_paths(folder / SEGMENTS)
    mine = list(damage(paths[world.rank :: world.size]))
    damaged = [found for rank in world.gather(mine) for found in rank]
    report = {"cache": str(folder), "segments": f"{len(paths):,}", "damaged": f"{len(damaged):,}"}
    if not damaged:
        filler = Filler(cfg, world)
        report |= filler.verify()
        filler.teacher.close()
    if world.is_main:
        print_report(report)
        for _, problem in damaged:
            log.error("%s", problem)
    if damaged:
        raise SystemExit(1)


def print_report(report: dict[str, str]) -> None:
    """As a table."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in report.items():
        table.add_row(name, value)
    Console(width=None if Console().is_terminal else 100).print(table)


def run_job(config: DictConfig, verify: bool) -> None:
    """Check the config and launch."""
    typed = to_object(config)
    validate(typed)
    if not isinstance(typed.teacher, CachedTeacherConfig):
        raise UserError("kd.cache fills the folder of teacher=cached: choose that teacher")
    if typed.parallel.nproc > 1 and "RANK" not in os.environ:
        hydra_config = HydraConfig.get()
        arguments = [*hydra_config.overrides.task, *([VERIFY] if verify else [])]
        launch_ranks("kd.cache", typed.parallel.nproc, hydra_config, arguments)
    else:
        run_rank(typed, verify)


def main() -> None:
    """Compose, fill or verify, and turn mistakes into plain words."""
    set_up_messages()
    register()
    verify = VERIFY in sys.argv
    arguments = [argument for argument in sys.argv if argument != VERIFY]

    def run(config: DictConfig) -> None:
        with job_mistakes(config):
            run_job(config, verify)

    with command_mistakes():
        if {"-m", "--multirun"} & set(arguments):
            raise HydraException("one cache is filled at a time: leave out --multirun")
        if "--config-name" not in " ".join(arguments) and "-cn" not in arguments:
            raise HydraException("name a config, e.g. --config-name digits_kd teacher=cached")
        sys.argv[:] = before_overrides(arguments, list(HYDRA_SETTINGS))
        hydra.main(version_base="1.3", config_path=config_dir(), config_name=None)(run)()


if __name__ == "__main__":
    main()
