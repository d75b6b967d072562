"""What a trained draft is worth: tokens per step and seconds per token, against the target alone.

    python scripts/bench_dflash.py --config-name dflash              after the run of that name
    python scripts/bench_dflash.py --config-name dflash run.name=mine --batch-size 1 8

Greedy responses to the run's validation prompts, by the target's own `generate` and by
`kd.dflash.generate`, batch by batch in turns, after one of each to warm up. The ids must be equal,
and the steps those that the run's evaluator counts without decoding. `forwards` is what the draft
saves at best: forwards of the target alone over those with the draft, prompts aside. Between it and
`speed-up` lie the draft's own time, the wider forward, and, with linear attention, reading accepted
tokens a second time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from hydra import compose, initialize_config_dir
from transformers.utils import logging as transformers_logging

from kd.config import register
from kd.config_dflash import DFlashConfig, register_dflash
from kd.data import Split, validation_batches
from kd.dflash import Decoded, Walk, acceptance, generate, load_draft, read_blocks, walks
from kd.launch import config_dir
from kd.model import cut
from kd.parallel import DTYPES
from kd.run import checked
from kd.types import Rollout, Sample, UserError
from recipes.dflash import DFlash

T = TypeVar("T")


@dataclass
class Tally:
    """Of the rows of one kind."""

    decoded: list[Decoded] = field(default_factory=list)
    seconds: float = 0.0
    seconds_alone: float = 0.0
    forwards: int = 0
    forwards_alone: int = 0

    def row(self) -> str:
        """Of the table."""
        num_tokens = sum(len(row.response_ids) for row in self.decoded)
        alone, with_draft = 1e3 * self.seconds_alone / num_tokens, 1e3 * self.seconds / num_tokens
        length = statistics.mean(row.accept_length for row in self.decoded if row.num_steps)
        return (
            f"{len(self.decoded)} | {num_tokens / len(self.decoded):.1f} | {length:.2f} | "
            f"{self.forwards_alone / max(1, self.forwards):.2f} | "
            f"{alone:.2f} | {with_draft:.2f} | {alone / with_draft:.2f} |"
        )


class Bench:
    """A run's target and exported draft, and its validation prompts."""

    def __init__(self, config: DFlashConfig) -> None:
        self.world = config.parallel.build()
        self.run = DFlash(config, self.world)
        self.most = config.validation.max_new_tokens
        draft = load_draft(config.run.path / "export")
        self.draft = draft.to(self.world.device, DTYPES[config.parallel.compute_dtype]).eval()

    def rows(self) -> list[Sample]:
        """The validation rows."""
        rows = self.run.val_rows
        assert rows is not None
        batches = validation_batches(rows, self.run.collator, Split(50, 0, 1))
        return [sample for batch in batches for sample in batch.samples]

    def alone(self, rows: list[Sample]) -> list[tuple[list[int], bool]]:
        """What the target says."""
        policy, prompts = self.run.policy, self.prompts(rows)
        ids = self.run.target.generate(prompts, self.most, policy.stop_ids, policy.forbidden_ids)
        return cut(ids, policy.stop_ids)

    def drafted(self, rows: list[Sample]) -> list[Decoded]:
        """The same by the draft."""
        run, policy = self.run, self.run.policy
        stop_ids, forbidden_ids = policy.stop_ids, policy.forbidden_ids
        return generate(
            run.target, self.draft, self.prompts(rows), self.most, stop_ids, forbidden_ids
        )

    def prompts(self, rows: list[Sample]):
        """On the device."""
        return self.run.policy.prompts(rows).to(self.world.device)

    def timed(self, decode: Callable[[list[Sample]], T], rows: list[Sample]) -> tuple[T, float]:
        """What it gives, and the seconds it took."""
        self.wait()
        start = time.perf_counter()
        found = decode(rows)
        self.wait()
        return found, time.perf_counter() - start

    def wait(self) -> None:
        """For the device."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def expected(self, rows: list[Sample], said: list[tuple[list[int], bool]]) -> list[Walk]:
        """Decoding as the evaluator foresees it."""
        rollouts = [
            Rollout(row, ids, finished, 0, "teacher")
            for row, (ids, finished) in zip(rows, said, strict=True)
        ]
        batch = self.run.collator(rollouts)
        if len(batch.samples) < len(rows):
            raise UserError(f"data.max_length: {len(rows) - len(batch.samples)} rows are too long")
        blocks = self.run.evaluator.maker(batch).to(self.world.device)
        states = self.run.states(batch.to(self.world.device), blocks)
        config = self.run.cfg.draft
        out = read_blocks(self.draft, states, blocks, config.weighting, 1.0, config.attention)
        return walks(out.correct_AT, [len(ids) for ids, _ in said])

    @torch.no_grad()
    def measure(self, rows: list[Sample], size: int) -> tuple[Tally, list[Walk]]:
        """Decode `size` rows at a time, both ways."""
        tally, found = Tally(), []
        self.alone(rows[:size])
        self.drafted(rows[:size])
        for some in (rows[i : i + size] for i in range(0, len(rows), size)):
            said, seconds_alone = self.timed(self.alone, some)
            decoded, seconds = self.timed(self.drafted, some)
            foreseen = self.expected(some, said)
            for row, (ids, _), got, walk in zip(some, said, decoded, foreseen, strict=True):
                assert got.response_ids == ids, f"{row.id}: another response"
                assert got.num_steps == len(walk.accepted), f"{row.id}: other steps"
            tally.decoded += decoded
            tally.seconds += seconds
            tally.seconds_alone += seconds_alone
            tally.forwards += max(row.num_steps for row in decoded)
            tally.forwards_alone += max(len(row.response_ids) - 1 for row in decoded)
            found += foreseen
        return tally, found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="a draft's accept length and speed-up")
    parser.add_argument("--config-name", required=True)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    register()
    register_dflash()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = checked(compose(args.config_name, overrides=args.overrides))
    assert isinstance(config, DFlashConfig)
    bench = Bench(config)
    rows = bench.rows()
    kinds = {
        "images": [row for row in rows if row.images],
        "text": [row for row in rows if not row.images],
    }
    columns = "tokens each | accept length | forwards | ms per token | with draft | speed-up"
    print(f"| rows at a time | rows of | rows | {columns} |\n|---|---|---|---|---|---|---|---|---|")
    found: list[Walk] = []
    with bench.run.target.gathered():
        for size, (name, some) in itertools.product(args.batch_size, kinds.items()):
            if some:
                tally, walked = bench.measure(some, size)
                found += walked if size == args.batch_size[0] else []
                print(f"| {size} | {name} |", tally.row(), flush=True)
    print("\n| position in the block | accepted |\n|---|---|")
    for k, (accepted, possible) in enumerate(acceptance(found, bench.draft.block_size), start=1):
        print(f"| {k} | {accepted / max(1, possible):.3f} |")


if __name__ == "__main__":
    main()
