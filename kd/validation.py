"""What the student (and the teacher) make of rows they are not trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from kd.config import ValidationConfig
from kd.logger import SampleRecord
from kd.metrics import Datasets, LossSum, mix
from kd.model import Student, cut
from kd.parallel import World
from kd.rollout import Policy, Rejections
from kd.teacher import BaseTeacher
from kd.types import Batch, Sample, UserError

log = logging.getLogger("kd")

ALL = ""
"""The label that every row has."""


class Validator:
    """Losses and answers on the validation rows, each row once over all ranks."""

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        student: Policy,
        teacher: Policy | None,
        kd_ratio: float,
        datasets: Datasets,
        config: ValidationConfig,
        on_broken_row: str,
        world: World,
    ) -> None:
        self.kd_ratio, self.datasets = kd_ratio, datasets
        self.batches, self.student, self.teacher = batches, student, teacher
        self.config, self.on_broken_row, self.world = config, on_broken_row, world
        self.teacher_answers: dict[str, str] = {}

    @torch.no_grad()
    def losses(self, student: Student, teacher: BaseTeacher) -> dict[str, float]:
        """val/loss, val/ce and val/kd per target token, from the training objective itself.

        Of a mixture also per data set.
        """
        losses = LossSum(self.world.device, self.datasets)
        of_datasets = self.datasets.counts([])
        rejections = Rejections(self.on_broken_row)
        num_targets = num_kd_targets = num_rows = 0
        problem = None
        for batch in told_ahead(self.batches(), teacher):
            num_targets += batch.num_targets
            num_kd_targets += batch.num_kd_targets
            num_rows += len(batch.samples)
            of_batch = self.datasets.counts([batch])
            of_datasets = [a + b for a, b in zip(of_datasets, of_batch, strict=True)]
            try:
                rejections.note(batch.rejected)
            except UserError as error:
                problem = problem or str(error)
            batch = batch.to(self.world.device)
            out = student.distill(batch, teacher.targets(batch), 1, 1)
            losses.add(batch, out)
        self.world.agree(problem)
        num_rejected = sum(rejections.counters.values())
        num_targets, num_kd_targets, num_rows, num_rejected, *of_datasets = self.world.sum_ints(
            num_targets, num_kd_targets, num_rows, num_rejected, *of_datasets
        )
        if num_targets == 0:
            self.world.agree(f"the validation split has no usable row ({num_rejected} rejected)")
        _, ce, kd, *sums = losses.reduce(self.world)
        ce, kd = ce / num_targets, kd / max(1, num_kd_targets)
        return {
            "val/loss": mix(ce, kd, self.kd_ratio),
            "val/ce": ce,
            "val/kd": kd,
            **self.datasets.metrics("val", self.kd_ratio, of_datasets, sums),
            "val/rows": num_rows,
            "val/rejected": num_rejected,
        }

    def answers(self) -> tuple[dict[str, float], list[SampleRecord]]:
        """Greedy answers: exact-answer accuracy over all rows and per label, and some of the rows.

        val/unfinished is the share of answers cut by max_new_tokens.
        """
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        unfinished = 0
        records: list[SampleRecord] = []
        for batch in self.batches():
            answers, num_cut = self._generate(self.student, batch)
            unfinished += num_cut
            shown = batch.samples[: max(0, self.config.report_samples - len(records))]
            told = self._teacher_answers(batch, bool(shown))
            for sample, answer in zip(batch.samples, answers, strict=True):
                correct = normalise(answer) == normalise(sample.answer or "")
                for label in {ALL, *sample.labels}:
                    asked[label] += 1
                    right[label] += correct
                if len(records) < self.config.report_samples:
                    records.append(_record(sample, answer, told.get(sample.id), correct))
        return self._reduce(right, asked, unfinished, records)

    def _reduce(
        self, right: Counter[str], asked: Counter[str], unfinished: int, records: list[SampleRecord]
    ) -> tuple[dict[str, float], list[SampleRecord]]:
        ranks = self.world.gather((right, asked, unfinished, records))
        right = sum((rank[0] for rank in ranks), Counter())
        asked = sum((rank[1] for rank in ranks), Counter())
        rows = max(1, asked[ALL])
        metrics = {"val/accuracy": right[ALL] / rows}
        metrics |= {f"val/accuracy_{k}": right[k] / asked[k] for k in sorted(asked) if k != ALL}
        metrics["val/unfinished"] = sum(rank[2] for rank in ranks) / rows
        shown = [record for rank in ranks for record in rank[3]]
        return metrics, shown[: self.config.report_samples]

    def _generate(self, policy: Policy, batch: Batch) -> tuple[list[str], int]:
        """Greedy answers, and how many of them were cut."""
        prompts = policy.prompts(batch.samples).to(self.world.device)
        ids = policy.vlm.generate(
            prompts, self.config.max_new_tokens, policy.stop_ids, policy.forbidden_ids
        )
        rows = cut(ids[: len(batch.samples)], policy.stop_ids)  # a filler row may follow
        decode = policy.processor.tokenizer.decode
        answers = [str(decode(ids, skip_special_tokens=True)) for ids, _ in rows]
        return answers, sum(not finished for _, finished in rows)

    def _teacher_answers(self, batch: Batch, wanted: bool) -> dict[str, str]:
        """The frozen teacher's answers never change: asked once per row."""
        known = all(sample.id in self.teacher_answers for sample in batch.samples)
        # Ranks decide together: a teacher's forward is a collective.
        if self.teacher is not None and max(self.world.gather(wanted and not known)):
            answers, _ = self._generate(self.teacher, batch)
            ids = (sample.id for sample in batch.samples)
            self.teacher_answers |= dict(zip(ids, answers, strict=False))
        return self.teacher_answers


def told_ahead(batches: Iterable[Batch], teacher: BaseTeacher) -> Iterator[Batch]:
    """The batches, while the teacher knows of the one after each."""
    held = None
    for batch in batches:
        teacher.expect([batch])
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def _record(sample: Sample, answer: str, teacher: str | None, correct: bool) -> SampleRecord:
    return SampleRecord(
        id=sample.id,
        kind=sample.kind,
        question=question(sample),
        answer=sample.answer or "",
        student=answer,
        teacher=teacher,
        correct=correct,
        images=sample.images,
    )


def question(sample: Sample) -> str:
    """The conversation as plain text, for people."""
    turns = []
    for message in sample.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = " ".join(p["text"] if p["type"] == "text" else f"[{p['type']}]" for p in parts)
        turns.append(text if message["role"] == "user" else f"{message['role']}: {text}")
    return "\n".join(turns)


def normalise(answer: str) -> str:
    """For comparing answers: case, white space and a final full stop do not count."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()
