"""Rows -> Batch. Legend: B batch, S sequence, N supervised tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from PIL import Image
from torch import Tensor

from kd.align import AlignedResponse, Aligner, Alignment, Groups
from kd.data.base import RowError
from kd.data.render import Prompt, Renderer
from kd.model import FindPositions, left_to_the_forward
from kd.types import IGNORE_INDEX, Batch, Inputs, Rejected, Response, Rollout, Sample

BLANK_PX = 32


@dataclass
class RenderedSample(Sample):
    """A sample with its prompts, so that generating and training render it once."""

    prompts: list[Prompt] = field(default_factory=list)
    """The student's, and the teacher's where it differs."""


@dataclass
class Row:
    """A row that fits: one prompt per model, and the response in the tokens of each."""

    prompts: list[Prompt]
    rollout: Rollout
    aligned: AlignedResponse

    @property
    def num_tokens(self) -> int:
        """Of prompt and response as the student reads them, those of images included."""
        return len(self.prompts[0].ids_S) + len(self.aligned.student_ids)

    @property
    def length(self) -> int:
        """Tokens in the longer of the renderings."""
        return max(self.num_tokens, len(self.prompts[-1].ids_S) + len(self.aligned.teacher_ids))

    @property
    def has_image(self) -> bool:
        """Whether the vision tower runs for it."""
        return bool(self.rollout.sample.images)

    @property
    def labels(self) -> list[int]:
        """What is learnt by cross-entropy; a student's own sample is only compared."""
        ids = self.rollout.response_ids
        return ids if self.rollout.is_reference else [IGNORE_INDEX] * len(ids)


class Collator:
    """Makes batches of samples (reference answers), rollouts (sampled ids) and rejected rows.

    `teacher` None: the teacher reads what the student reads, or there is none; `aligner`: it has
    another tokenizer. `lockstep` (more than one rank): a batch without an image gets one more row,
    a blank image with no target, so that every rank runs the vision tower and thereby the same
    collectives. `positions`: those of the student's model and of the teacher's.
    """

    def __init__(
        self,
        student: Renderer,
        teacher: Renderer | None,
        max_length: int,
        lockstep: bool,
        aligner: Aligner | None = None,
        positions: tuple[FindPositions, FindPositions] = (left_to_the_forward, left_to_the_forward),
    ):
        assert aligner is None or teacher is not None
        self.student, self.teacher = student, teacher
        self.max_length, self.lockstep = max_length, lockstep
        self.aligner, self.positions = aligner, positions

    @property
    def renderers(self) -> list[Renderer]:
        """The student's, and the teacher's where it differs."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def __call__(self, rows: list[Sample | Rejected | Rollout]) -> Batch:
        """A right-padded batch; `samples` are the rows of it, in order.

        A row too long in either rendering is never cut but named in `rejected`, and so is one that
        cannot be rendered. One row may follow those of `samples`: a filler with no target, in a
        batch with no row left, and in one without an image under `lockstep`.
        """
        return self.batch(self.prepare(rows))

    def prepare(self, rows: list[Sample | Rejected | Rollout]) -> list[Row | Rejected]:
        """The rows as they are to be read, one outcome for each."""
        return [self._row(row) for row in rows]

    def batch(self, outcomes: list[Row | Rejected], *, packed: bool = False) -> Batch:
        """A micro-batch of prepared rows: padded, or `packed` into one sequence."""
        kept = [row for row in outcomes if isinstance(row, Row)]
        rejected = [row for row in outcomes if isinstance(row, Rejected)]
        filled = kept + self._filler([row.rollout.sample for row in kept])
        student = self._inputs(filled, 0, packed)
        if self.teacher is None:
            teacher = student.placed(self.positions[1](student))  # mostly itself
        else:
            teacher = self._inputs(filled, 1, packed)
        labels_N = torch.tensor([t for row in filled for t in row.labels], dtype=torch.int64)
        labels_BS = torch.full_like(student.input_ids_BS, IGNORE_INDEX)
        labels_BS.view(-1)[student.target_rows_N] = labels_N
        rollouts = [row.rollout for row in kept]
        batch = Batch(student, teacher, labels_BS, labels_N, rollouts, rejected)
        batch.num_tokens = sum(row.num_tokens for row in kept)
        batch.responses = [
            Response(row.rollout.sample, row.prompts[-1].ids_S.tolist(), row.aligned.teacher_ids)
            for row in kept
        ]
        if self.aligner is not None:
            batch.groups = _groups([row.aligned for row in filled])
            batch.num_unaligned = sum(row.aligned.problem is not None for row in filled)
        return batch

    def _inputs(self, rows: list[Row], which: int, packed: bool) -> Inputs:
        prompts = [row.prompts[which] for row in rows]
        sides = ((row.aligned.student_ids, row.aligned.teacher_ids) for row in rows)
        responses = [ids[which] for ids in sides]
        inputs = (
            _pack(prompts, responses)
            if packed
            else _pad_right(prompts, responses, self.renderers[which].pad_token_id)
        )
        return inputs.placed(self.positions[which](inputs))

    @functools.cached_property
    def filler_length(self) -> int:
        """Tokens of the row that a batch without an image gets; 0: it gets none."""
        return self._filler([])[0].length if self.lockstep else 0

    def prompts(
        self, samples: list[Sample], *, teacher: bool = False, filler: bool = True
    ) -> Inputs:
        """Prompts in the student's or the teacher's rendering, left-padded, without targets.

        Without positions: generating finds those of the tokens to come as well. A filler row may
        come last, as in a batch, unless `filler` is False, for forwards that are
        no collective. Raises RowError for a row that `screen` refuses.
        """
        which = -1 if teacher else 0
        prompts = [self._prompts(sample)[which] for sample in samples]
        if filler:
            prompts += [row.prompts[which] for row in self._filler(samples)]
        return _pad_left(prompts, self.renderers[which].pad_token_id)

    def render(self, rows: list[Sample | Rejected]) -> list[Sample | Rejected]:
        """The rows, their prompts rendered, for those who generate; a bad one as Rejected."""
        return [self._render(row) for row in rows]

    def _render(self, row: Sample | Rejected) -> Sample | Rejected:
        if isinstance(row, Rejected):
            return row
        try:
            prompts = self._prompts(row)
        except RowError as error:
            return Rejected(row.id, str(error), broken=True)
        return RenderedSample(
            row.id, row.messages, row.images, row.answer, row.kind, row.dataset, prompts
        )

    def screen(
        self, rows: list[Sample | Rejected], response_tokens: int | None
    ) -> tuple[list[Sample], list[Rejected]]:
        """Sort out what cannot be read, or has no room for `response_tokens` (None: its answer)."""
        usable: list[Sample] = []
        rejected: list[Rejected] = []
        for row in self.render(rows):
            found = row
            if isinstance(row, Sample) and response_tokens is None:
                found = self._row(row)
            elif isinstance(row, Sample) and response_tokens is not None:
                found = self._too_long(row, self._prompts(row), response_tokens)
            if isinstance(found, Rejected):
                rejected.append(found)
            elif isinstance(row, Sample):
                usable.append(row)
        return usable, rejected

    def _row(self, row: Sample | Rejected | Rollout) -> Row | Rejected:
        if isinstance(row, Rejected):
            return row
        sample = row.sample if isinstance(row, Rollout) else row
        try:
            rollout, aligned = self._response(row)
            prompts = self._prompts(sample)
        except RowError as error:
            return Rejected(sample.id, str(error), broken=True)
        longest = max(len(aligned.student_ids), len(aligned.teacher_ids))
        return self._too_long(sample, prompts, longest) or Row(prompts, rollout, aligned)

    def _response(self, row: Sample | Rollout) -> tuple[Rollout, AlignedResponse]:
        """What is trained on, in the student's tokens, and the same in the teacher's."""
        rollout = row if isinstance(row, Rollout) else self._reference(row)
        if self.aligner is None:
            ids = rollout.response_ids
            return rollout, AlignedResponse(ids, ids, Alignment([]))
        answer_ids = None
        if rollout.policy == "dataset" and self.teacher is not None:
            answer_ids = self.teacher.response(rollout.sample.answer or "")
        aligned = self.aligner(rollout, answer_ids)
        return replace(rollout, response_ids=aligned.student_ids), aligned

    def _prompts(self, sample: Sample) -> list[Prompt]:
        if isinstance(sample, RenderedSample):
            return sample.prompts
        return [renderer.prompt(sample) for renderer in self.renderers]

    def _too_long(
        self, sample: Sample, prompts: list[Prompt], response_tokens: int
    ) -> Rejected | None:
        lengths = [len(prompt.ids_S) for prompt in prompts]
        if max(lengths) + response_tokens <= self.max_length:
            return None
        which = lengths.index(max(lengths))
        reason = (
            f"{lengths[which]} + {response_tokens} tokens of prompt and response, "
            f"more than data.max_length {self.max_length}"
        )
        if sample.images:
            side = ("student", "teacher")[which]
            tokens = self.renderers[which].image_tokens(sample, prompts[which])
            reason += (
                f" ({tokens} of them for images: raise it, or make the images smaller by "
                f"{side}.processor.max_pixels or {side}.processor.image)"
            )
        return Rejected(sample.id, reason, broken=False)

    def _reference(self, sample: Sample) -> Rollout:
        if sample.answer is None:
            raise RowError("it has no answer")
        return Rollout(sample, self.student.response(sample.answer), True, 0, "dataset")

    def _filler(self, samples: list[Sample]) -> list[Row]:
        has_image = any(sample.images for sample in samples)
        if has_image if self.lockstep else samples:
            return []
        images = [Image.new("RGB", (BLANK_PX, BLANK_PX))] if self.lockstep else []
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "."}]
        sample = Sample("filler", [{"role": "user", "content": content}], images, None)
        nothing = AlignedResponse([], [], Alignment([]))
        return [Row(self._prompts(sample), Rollout(sample, [], True, 0, "dataset"), nothing)]


def _groups(responses: list[AlignedResponse]) -> Groups:
    return Groups.join(
        [response.student_ids for response in responses],
        [response.teacher_ids for response in responses],
        [response.alignment for response in responses],
    )


def _whole(prompts: list[Prompt], responses: list[list[int]]) -> list[Tensor]:
    """Prompt + response per row."""
    return [
        torch.cat([p.ids_S, torch.tensor(r, dtype=torch.int64)])
        for p, r in zip(prompts, responses, strict=True)
    ]


def _pack(prompts: list[Prompt], responses: list[list[int]]) -> Inputs:
    """Prompt + response, one row after the other in one sequence."""
    ids = _whole(prompts, responses)
    lengths = [len(row) for row in ids]
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    rows = [
        torch.arange(len(r)) + start + len(p.ids_S) - 1
        for start, p, r in zip(starts, prompts, responses, strict=True)
    ]
    input_ids_BS = torch.cat(ids)[None]
    return Inputs(
        input_ids_BS,
        torch.ones_like(input_ids_BS),
        torch.cat(rows),
        _aligned(prompts, (1, sum(lengths)), [(0, start) for start in starts]) | _joined(prompts),
        lengths,
    )


def _pad_right(prompts: list[Prompt], responses: list[list[int]], pad_token_id: int) -> Inputs:
    """Prompt + response per row, padded on the right."""
    ids = _whole(prompts, responses)
    input_ids_BS = _pad(ids, pad_token_id, left=False)
    length = input_ids_BS.shape[1]
    # Position s predicts token s + 1: the first target is predicted by the prompt's last token.
    rows = [
        torch.arange(len(r)) + b * length + len(p.ids_S) - 1
        for b, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]
    return Inputs(
        input_ids_BS,
        _pad([torch.ones_like(row) for row in ids], 0, left=False),
        torch.cat(rows),
        _aligned(prompts, tuple(input_ids_BS.shape), [(b, 0) for b in range(len(ids))])
        | _joined(prompts),
    )


def _pad_left(prompts: list[Prompt], pad_token_id: int) -> Inputs:
    input_ids_BS = _pad([p.ids_S for p in prompts], pad_token_id, left=True)
    return Inputs(
        input_ids_BS,
        _pad([torch.ones_like(p.ids_S) for p in prompts], 0, left=True),
        torch.empty(0, dtype=torch.int64),
        _aligned(
            prompts,
            tuple(input_ids_BS.shape),
            [(b, input_ids_BS.shape[1] - len(p.ids_S)) for b, p in enumerate(prompts)],
        )
        | _joined(prompts),
    )


def _aligned(
    prompts: list[Prompt], shape: tuple[int, ...], places: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """Per-token media; 0 over the responses and the padding. `places`: where each prompt begins."""
    aligned = {
        name: torch.zeros(shape, dtype=x.dtype) for p in prompts for name, x in p.aligned_S.items()
    }
    for prompt, (b, start) in zip(prompts, places, strict=True):
        for name, x_S in prompt.aligned_S.items():
            aligned[name][b, start : start + len(x_S)] = x_S
    return aligned


def _joined(prompts: list[Prompt]) -> dict[str, Tensor]:
    """All other media, on dimension 0."""
    names = dict.fromkeys(name for p in prompts for name in p.media)
    return {name: _join([p.media[name] for p in prompts if name in p.media]) for name in names}


def _join(media: list[Tensor]) -> Tensor:
    """On dimension 0; the others padded to the largest with 0 at their end, as processors do."""
    sizes = [max(of_dim) for of_dim in zip(*(x.shape[1:] for x in media), strict=True)]
    return torch.cat([_grow(x, sizes) for x in media])


def _grow(x: Tensor, sizes: list[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, x.shape[1:], strict=True)]
    return torch.nn.functional.pad(x, [n for size in reversed(missing) for n in (0, size)])


def _pad(rows: list[Tensor], value: int, *, left: bool) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )
