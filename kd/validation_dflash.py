"""What a draft is worth on rows it is not trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from kd.config import ValidationConfig
from kd.data import Collator
from kd.dflash import (
    LEAST_TOKENS,
    BlockMaker,
    Blocks,
    Draft,
    DraftConfig,
    DraftOutput,
    Walk,
    acceptance,
    read_blocks,
    walks,
)
from kd.logger import SampleRecord
from kd.model import cut
from kd.parallel import World
from kd.rollout import Policy, Rejections
from kd.states_dflash import LiveStates
from kd.types import Batch, Rollout, Sample, UserError
from kd.validation import question

STEP = " | "
"""Between what one step of decoding gives and the next, for people."""


class DraftEvaluator:
    """Accept lengths on validation rows, each row once over all ranks. All of it is collective."""

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        collate: Collator,
        policy: Policy,
        states: LiveStates,
        draft: Draft,
        maker: BlockMaker,
        config: DraftConfig,
        validation: ValidationConfig,
        on_broken_row: str,
        world: World,
    ) -> None:
        self.batches, self.collate, self.policy = batches, collate, policy
        self.states = states
        self.draft, self.maker, self.config = draft, maker, config
        self.validation, self.on_broken_row, self.world = validation, on_broken_row, world
        self.said: dict[str, tuple[list[int], bool]] = {}
        """The frozen target's greedy responses by row, asked for once."""

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], list[SampleRecord]]:
        """The metrics, and some rows with their responses cut into the steps of decoding.

        val/accept_length is the mean over rows of each row's tokens per step; also by rows with
        images and without. val/accept_k: of the steps whose block reaches position k, the share
        that accepts it.
        """
        rejections = Rejections(self.on_broken_row)
        rows: list[_Row] = []
        loss, counts, num_blocks, problem = 0.0, [0] * (self.config.block_size - 1), 0, None
        for asked in self.batches():
            batch = self.collate(self._respond(asked))
            try:
                rejections.note([*asked.rejected, *batch.rejected])
                blocks = self.maker(batch)
            except UserError as error:
                problem, batch = problem or str(error), self.collate([])
                blocks = self.maker(batch)
            found, out = self._read(batch, blocks)
            loss += float(out.loss)
            counts = [a + b for a, b in zip(counts, blocks.counts(), strict=True)]
            num_blocks += blocks.num_blocks
            rows += found
        self.world.agree(problem)
        return self._reduce(rows, loss, counts, num_blocks, rejections)

    def _respond(self, batch: Batch) -> list[Rollout]:
        """What the target says to the rows of a batch."""
        policy = self.policy
        known = all(sample.id in self.said for sample in batch.samples)
        # Ranks decide together: the target's forward is a collective.
        if max(self.world.gather(not known)):
            prompts = policy.prompts(batch.samples).to(self.world.device)
            ids = policy.vlm.generate(
                prompts, self.validation.max_new_tokens, policy.stop_ids, policy.forbidden_ids
            )
            said = cut(ids[: len(batch.samples)], policy.stop_ids)
            self.said |= dict(zip((s.id for s in batch.samples), said, strict=True))
        return [Rollout(s, *self.said[s.id], 0, "teacher") for s in batch.samples]

    def _read(self, batch: Batch, blocks: Blocks) -> tuple[list[_Row], DraftOutput]:
        blocks = blocks.to(self.world.device)
        states = self.states(batch.to(self.world.device), blocks)
        out = read_blocks(
            self.draft, states, blocks, self.config.weighting, 1.0, self.config.attention
        )
        lengths = [len(response.response_ids) for response in batch.responses]
        found = walks(out.correct_AT, lengths)
        return [
            _Row(rollout.sample, rollout.response_ids, walk)
            for rollout, walk in zip(batch.rollouts, found, strict=True)
        ], out

    def _reduce(
        self,
        rows: list[_Row],
        loss: float,
        counts: list[int],
        num_blocks: int,
        rejections: Rejections,
    ) -> tuple[dict[str, float], list[SampleRecord]]:
        mine = [(bool(row.sample.images), row.sample.labels, row.walk) for row in rows]
        shown = [self._record(row) for row in rows[: self.validation.report_samples]]
        ranks = self.world.gather((mine, shown, loss))
        num_rejected, num_blocks, *counts = self.world.sum_ints(
            sum(rejections.counters.values()), num_blocks, *counts
        )
        told = [row for rank in ranks for row in rank[0]]
        usable = [(images, labels, walk) for images, labels, walk in told if walk.accepted]
        if not usable:
            self.world.agree(
                f"no validation row has a response of {LEAST_TOKENS} tokens or more "
                f"({num_rejected} rejected)"
            )
        norm = self.config.weighting.normaliser(counts, num_blocks) or 1.0
        metrics = {
            "val/loss": sum(rank[2] for rank in ranks) / norm,
            "val/accept_length": _mean(usable),
            **_means("val/accept_length_image", [row for row in usable if row[0]]),
            **_means("val/accept_length_text", [row for row in usable if not row[0]]),
        }
        for name in sorted(set().union(*(labels for _, labels, _ in usable))):
            metrics[f"val/accept_length_{name}"] = _mean([row for row in usable if name in row[1]])
        steps = acceptance([walk for _, _, walk in usable], self.config.block_size)
        for k, (accepted, possible) in enumerate(steps, start=1):
            if possible:
                metrics[f"val/accept_{k}"] = accepted / possible
        metrics |= {
            "val/rows": len(told),
            "val/rejected": num_rejected,
            "val/too_short": len(told) - len(usable),
        }
        records = [record for rank in ranks for record in rank[1]]
        return metrics, records[: self.validation.report_samples]

    def _record(self, row: _Row) -> SampleRecord:
        decode = self.policy.processor.tokenizer.decode
        bounds = [0, 1]  # the first token is the prompt's forward's
        for accepted in row.walk.accepted:
            bounds.append(bounds[-1] + accepted + 1)
        pieces = [decode(row.ids[a:b]) for a, b in itertools.pairwise(bounds)]
        best = -(-row.walk.num_tokens // self.config.block_size)
        return SampleRecord(
            id=row.sample.id,
            kind=row.sample.kind,
            question=question(row.sample),
            answer=row.sample.answer or "",
            student=STEP.join(str(piece) for piece in pieces),
            teacher=str(decode(row.ids, skip_special_tokens=True)),
            correct=len(row.walk.accepted) == best,
            images=row.sample.images,
        )


@dataclass
class _Row:
    sample: Sample
    ids: list[int]
    walk: Walk


def _mean(rows: list[tuple[bool, set[str], Walk]]) -> float:
    return sum(walk.accept_length for _, _, walk in rows) / len(rows)


def _means(name: str, rows: list[tuple[bool, set[str], Walk]]) -> dict[str, float]:
    return {name: _mean(rows)} if rows else {}
