"""Checks before the first step, of what would train for hours without an error and be wrong.

`doctor=auto` runs them before step 1 and ends the run where one fails, `doctor=only` ends after
them, `doctor=never` leaves them out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import ProcessorMixin

from kd.data import Collator, Renderer, Rows, ranges_of
from kd.model import VLM, Kernels, Student
from kd.parallel import World
from kd.teacher import BaseTeacher, NoTeacher
from kd.types import Batch, Rejected, Sample, TeacherTargets

ROWS = 4
ROWS_EACH = 2
"""Of every data set of a mixture."""
ROWS_READ = 64
"""Rows of a data set looked through for one with an image."""
SELF_DIVERGENCE = 1e-3
"""Per token, between a model and itself in the same precision."""
BLIND = 1e-5
"""A divergence that moves less when all images are wiped is rounding."""


class Result(IntEnum):
    """Of a check; what is to be told before the others is greater."""

    skipped = 0
    passed = 1
    warning = 2
    failed = 3

    @property
    def word(self) -> str:
        """In the table."""
        return "not asked" if self is Result.skipped else self.name


@dataclass
class Check:
    """One line of the table."""

    name: str
    result: Result
    finding: str
    fix: str = ""
    """What to do where it has not passed."""


class Doctor:
    """Runs the checks on a few training rows of each data set. All of it is collective."""

    def __init__(
        self,
        rows: Rows,
        collator: Collator,
        student: Student,
        teacher: BaseTeacher,
        *,
        teacher_sees_new_rows: bool,
        world: World,
    ) -> None:
        self.collator, self.student, self.teacher = collator, student, teacher
        self.teacher_sees_new_rows, self.world = teacher_sees_new_rows, world
        datasets = ranges_of(rows)
        number = ROWS if len(datasets) == 1 else ROWS_EACH
        self.batches = {
            name: collator(_choose(rows, indices, number)) for name, indices in datasets.items()
        }

    def __call__(self) -> list[Check]:
        """All checks, in the order in which one may explain the next. Randomness is left alone."""
        kernels = check_kernels([self.student, self.teacher.vlm], self.world.device.type)
        if any(check.result is Result.failed for check in kernels):
            return kernels
        found = [(n, check) for n, batch in self.batches.items() for check in self._texts(batch)]
        if any(check.result is Result.failed for _, check in found):
            return kernels + self._lines(found)
        self.student.eval()
        try:
            for name, batch in self.batches.items():
                if batch.rollouts:
                    found += [(name, self._self_divergence(batch)), (name, self._sight(batch))]
        finally:
            self.student.train()
        return kernels + self._lines(found)

    def _lines(self, found: list[tuple[str, Check]]) -> list[Check]:
        """One for each check: its worst result, and in which data sets unless it is all."""
        by_check: dict[str, list[tuple[str, Check]]] = {}
        for name, check in found:
            by_check.setdefault(check.name, []).append((name, check))
        lines = []
        for checks in by_check.values():
            worst = max((check for _, check in checks), key=lambda check: check.result)
            names: dict[str, list[str]] = {}
            for name, check in checks:
                if check.result is worst.result:
                    names.setdefault(check.finding, []).append(name)
            findings = (
                finding if len(of) == len(self.batches) else f"in {', '.join(of)}: {finding}"
                for finding, of in names.items()
            )
            lines.append(dataclasses.replace(worst, finding="; ".join(findings)))
        return lines

    # ---- the text --------------------------------------------------------------------------------

    def _texts(self, batch: Batch) -> list[Check]:
        if not batch.rollouts:
            reasons = "; ".join(f"{r.id}: {r.reason}" for r in batch.rejected[:2])
            return [Check("rows", Result.warning, f"the first rows are unusable ({reasons})")]
        return [self._labels(batch), self._end_of_turn(batch), *self._image_tokens(batch)]

    def _labels(self, batch: Batch) -> Check:
        """The ids that are learnt spell the answer, and end."""
        renderer, lost = self.collator.student, []
        for rollout in batch.rollouts:
            decoded = renderer.processor.tokenizer.decode(rollout.response_ids[:-1])
            if str(decoded).strip() != (rollout.sample.answer or "").strip():
                lost.append((rollout.sample.answer, decoded))
        if not lost:
            return Check("labels", Result.passed, "they decode to the answers")
        return Check(
            "labels",
            Result.warning,
            f"{lost[0][0]!r} comes back from its tokens as {lost[0][1]!r}",
            "the student can only learn what its tokenizer can spell: clean the answers, or "
            "choose another student",
        )

    def _end_of_turn(self, batch: Batch) -> Check:
        """The chat template closes an answer with the token that responses end with."""
        renderer = self.collator.student
        eos = renderer.processor.tokenizer.eos_token
        closing = _closing(renderer, batch.samples[0])
        if eos in closing:
            return Check("end of a response", Result.passed, f"{eos}, as in the chat template")
        return Check(
            "end of a response",
            Result.warning,
            f"responses end with {eos}, the chat template closes a turn with {closing.strip()!r}",
            "serve the student with a generation config that stops at both, or use a processor "
            "whose EOS is the end of a turn",
        )

    def _image_tokens(self, batch: Batch) -> list[Check]:
        """Each model's prompts hold tokens for the images of the rows."""
        images = sum(len(sample.images) for sample in batch.samples)
        if images == 0:
            return [Check("image tokens", Result.skipped, f"no image in {ROWS_READ} rows")]
        checks = []
        sides = zip(("student", "teacher"), self.collator.renderers, strict=False)
        for side, renderer in sides:
            inputs = batch.student if side == "student" else batch.teacher
            number = int((inputs.input_ids_BS == feature_token(renderer.processor)).sum())
            finding = f"{number} tokens for {images} images" if number else "none in the prompts"
            fix = "its processor renders no images: give the model's own (processor.name)"
            passed = Result.passed if number else Result.failed
            checks.append(Check(f"image tokens ({side})", passed, finding, fix))
        return checks

    # ---- the models ------------------------------------------------------------------------------

    def _self_divergence(self, batch: Batch) -> Check:
        """With itself as the teacher, the student has nothing to learn."""
        name = "teacher = student"
        if isinstance(self.teacher, NoTeacher):
            return Check(name, Result.skipped, "no teacher is compared with")
        targets = self.student.targets(batch.to(self.world.device).student)
        worst = self._divergence(batch, targets).abs().max().item()
        return Check(
            name,
            Result.passed if worst <= SELF_DIVERGENCE else Result.failed,
            f"divergence of at most {worst:.1e} per token",
            "this precision or attention is not good enough to compare two models: try "
            "parallel.compute_dtype=float32 or attn_implementation=eager",
        )

    def _sight(self, batch: Batch) -> Check:
        """The teacher's word depends on the images."""
        name = "teacher sees images"
        if isinstance(self.teacher, NoTeacher):
            return Check(name, Result.skipped, "no teacher is compared with")
        if not any(sample.images for sample in batch.samples):
            return Check(name, Result.skipped, f"no image in {ROWS_READ} rows")
        if not self.teacher_sees_new_rows:
            return Check(name, Result.skipped, "a cache knows no other images")
        wiped = self.collator([_wiped(sample) for sample in batch.samples])
        real, blank = (self._teacher_divergence(batch, shown) for shown in (batch, wiped))
        moved = (real - blank).abs().max().item() if real.shape == blank.shape else float("inf")
        return Check(
            name,
            Result.passed if moved > BLIND else Result.failed,
            f"its divergence moves by up to {moved:.1e} when they are wiped",
            "it answers without looking: check that teacher.name is a vision-language model, that "
            "its server gets images, and teacher.processor",
        )

    def _teacher_divergence(self, batch: Batch, shown: Batch) -> Tensor:
        """Of the student on `batch` from the teacher on what it is shown."""
        self.teacher.expect([shown])
        targets = self.teacher.targets(shown.to(self.world.device))
        assert targets is not None
        return self._divergence(batch, targets)

    def _divergence(self, batch: Batch, targets: TeacherTargets) -> Tensor:
        """Of the student on the rows, images and all, from these targets, [N]."""
        with torch.no_grad():
            return self.student.distill(batch.to(self.world.device), targets, 1, None).kd_N


def check_kernels(models: list[VLM | None], device_type: str) -> list[Check]:
    """On a GPU, a line for each model whose layers can run as kernels: whether they do."""
    if device_type != "cuda":
        return []
    checks = []
    for model in models:
        if model is None or model.kernels == Kernels():
            continue
        name, kernels = f"fused layers ({model.role})", model.kernels
        if not kernels.missing:
            checks.append(Check(name, Result.passed, f"by {', '.join(sorted(kernels.fused))}"))
            continue
        finding, fix = f"its {kernels.finding}", kernels.fix
        if kernels.recurs_in_torch:
            fix += ", or go on without: doctor=never"
        result = Result.failed if kernels.recurs_in_torch else Result.warning
        checks.append(Check(name, result, finding, fix))
    return checks


def report(checks: list[Check], world: World) -> None:
    """Print the table; end the run on all ranks by the first check that has failed."""
    if world.is_main:
        table = Table(title="doctor", title_justify="left", show_header=False)
        for check in checks:
            colour = {Result.passed: "green", Result.warning: "yellow", Result.failed: "red"}
            table.add_row(
                f"[{colour.get(check.result, 'dim')}]{check.result.word}",
                check.name,
                # Not markup: a token of the model may look like it.
                Text(check.finding + (f"\n{check.fix}" if check.result is Result.warning else "")),
            )
        console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 120)
        console.print(table)
    failed = next((check for check in checks if check.result is Result.failed), None)
    world.agree(failed and f"doctor: {failed.name}: {failed.finding}\n{failed.fix}")


def _choose(rows: Rows, indices: range, number: int) -> list[Sample] | list[Rejected]:
    """The first usable rows, one of them with an image if there is any near the beginning.

    Where none is usable, those that are not.
    """
    found: list[Sample] = []
    rejected: list[Rejected] = []
    for index in indices[:ROWS_READ]:
        row = rows[index]
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        # A row without an answer is one that is responded to later: any text does.
        sample = dataclasses.replace(row, answer=row.answer or "Yes.")
        if len(found) < number:
            found.append(sample)
        elif any(s.images for s in found):
            break
        elif sample.images:
            found[-1] = sample
    return found or rejected


def feature_token(processor: ProcessorMixin) -> int:
    """The token in whose places the features of an image go."""
    # Gemma 3's image_token_id is the mark before an image, one of each however it is read.
    own, all_ids = processor.image_token_id, processor.image_token_ids
    found = own if own in all_ids else all_ids[0]
    assert found is not None
    return found


def _wiped(sample: Sample) -> Sample:
    """Its images in plain grey, of the same sizes."""
    images = [Image.new("RGB", image.size, (127, 127, 127)) for image in sample.images]
    return dataclasses.replace(sample, images=images)


def _closing(renderer: Renderer, sample: Sample) -> str:
    """What the chat template writes after an answer."""
    answer = sample.answer or ""
    is_text = isinstance(sample.messages[-1]["content"], str)
    content = answer if is_text else [{"type": "text", "text": answer}]
    turns = [*sample.messages, {"role": "assistant", "content": content}]
    text = renderer.processor.apply_chat_template(
        turns, tokenize=False, **renderer.chat_template_kwargs
    )
    return str(text).rpartition(answer)[2]
