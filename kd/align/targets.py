"""A teacher's word on responses that its tokenizer splits otherwise.

Shape legend: N response rows of the student, M of the teacher, R of either, G groups, K pairs of
matched tokens, D hidden, V vocabulary of the teacher.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.align.alignment import Alignment, Group
from kd.types import DenseTargets, UserError

NEEDS_ALIGNED_LOSS = (
    "The teacher has another tokenizer than the student, so this loss cannot compare them token "
    "by token: different tokenizers need loss=uld or loss=gold."
)


@dataclass
class Side:
    """The response rows of one model; row r predicts `ids_R[r]`."""

    ids_R: Tensor
    """The tokens of the response, also where the student is given no label."""
    group_R: Tensor
    """The group of each row; G for a row of a response that could not be aligned."""
    first_G: Tensor
    last_G: Tensor
    """The first and the last row of each group."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Side:
        """The same with every tensor changed."""
        return Side(*(change(getattr(self, f.name)) for f in dataclasses.fields(self)))

    @staticmethod
    def of(ids: list[int], spans: list[tuple[int, int]]) -> Side:
        """From the (start, length) of each group."""
        group_R = torch.full((len(ids),), len(spans), dtype=torch.int64)
        for g, (start, length) in enumerate(spans):
            group_R[start : start + length] = g
        bounds = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
        first_G = bounds[:, 0].contiguous()
        return Side(torch.tensor(ids, dtype=torch.int64), group_R, first_G, bounds.sum(1) - 1)


@dataclass
class Groups:
    """The groups of a batch, in order, over its N student rows and M teacher rows.

    A row of either side that is in no group is a response that could not be aligned: it has no
    part in the KD term.
    """

    spans: list[Group]
    """On the host, where chunks are cut."""
    student: Side
    teacher: Side

    @staticmethod
    def join(
        student_ids: list[list[int]], teacher_ids: list[list[int]], alignments: list[Alignment]
    ) -> Groups:
        """The groups of several responses, one after another. An Alignment([]) has none."""
        spans: list[Group] = []
        n = m = 0
        for ours, theirs, alignment in zip(student_ids, teacher_ids, alignments, strict=True):
            spans += [(n + s, s_len, m + t, t_len) for s, s_len, t, t_len in alignment.groups]
            n, m = n + len(ours), m + len(theirs)
        return Groups(
            spans,
            Side.of([i for ids in student_ids for i in ids], [(s, k) for s, k, _, _ in spans]),
            Side.of([i for ids in teacher_ids for i in ids], [(t, k) for _, _, t, k in spans]),
        )

    @staticmethod
    def one_to_one(rows: int, device: torch.device) -> Groups:
        """For one tokenizer: each token is a group of its own, and nothing is merged."""
        row_R = torch.arange(rows, device=device)
        side = Side(torch.zeros_like(row_R), row_R, row_R, row_R)
        return Groups([(r, 1, r, 1) for r in range(rows)], side, side)

    @property
    def num_groups(self) -> int:
        """G: what the KD term is divided by, summed over the optimizer step."""
        return len(self.spans)

    @property
    def num_student_rows(self) -> int:
        """How many of the N student rows are in a group."""
        return sum(length for _, length, _, _ in self.spans)

    def counts(self, lengths: list[int]) -> list[int]:
        """Groups of each response, given the student rows of each; no group is in two of them."""
        starts = [start for start, _, _, _ in self.spans]
        ends = [bisect.bisect_left(starts, end) for end in itertools.accumulate(lengths)]
        return [end - begin for begin, end in itertools.pairwise([0, *ends])]

    def map(self, change: Callable[[Tensor], Tensor]) -> Groups:
        """The same with every tensor changed."""
        return Groups(self.spans, self.student.map(change), self.teacher.map(change))

    def within(self, rows: slice) -> tuple[slice, slice]:
        """(groups, teacher rows) of a chunk of student rows that cuts no group."""
        first, last = (
            bisect.bisect_left(self.spans, row, key=operator.itemgetter(0))
            for row in (rows.start, rows.stop)
        )
        groups = slice(first, last)
        spans = self.spans[groups]
        if not spans:
            return groups, slice(0, 0)
        assert spans[-1][0] + spans[-1][1] <= rows.stop, "a chunk cuts a group"
        return groups, slice(spans[0][2], spans[-1][2] + spans[-1][3])

    def chunks(self, max_rows: int) -> list[slice]:
        """Chunks of student rows of whole groups, at most `max_rows` of either side.

        A group that is longer than that is a chunk by itself.
        """
        chunks, begin, teacher_begin = [], 0, 0
        for start, stop, teacher_start, teacher_stop in self._units():
            used = max(stop - begin, teacher_stop - teacher_begin)
            if used > max_rows and start > begin:
                chunks.append(slice(begin, start))
                begin, teacher_begin = start, teacher_start
        rows = len(self.student.ids_R)
        return [*chunks, slice(begin, rows)] if rows else []

    def _units(self) -> list[Group]:
        """(student_start, student_stop, teacher_start, teacher_stop) of all that stays whole."""
        units, row, teacher_row = [], 0, 0
        end = (len(self.student.ids_R), 0, len(self.teacher.ids_R), 0)
        for start, length, teacher_start, teacher_length in [*self.spans, end]:
            units += [(r, r + 1, teacher_row, teacher_row) for r in range(row, start)]
            row, teacher_row = start + length, teacher_start + teacher_length
            units.append((start, row, teacher_start, teacher_row))
        return units[:-1]


@dataclass
class MatchedVocabulary:
    """K pairs of tokens that are the same in both vocabularies."""

    student_ids_K: Tensor
    teacher_ids_K: Tensor
    student_size: int
    teacher_size: int
    """Entries that a model's head needs for them: known on the host, for checking."""

    @staticmethod
    def of(student_ids_K: Tensor, teacher_ids_K: Tensor) -> MatchedVocabulary:
        """From what `matched_vocabulary` returns, on the CPU."""
        sizes = (int(ids.max()) + 1 if len(ids) else 0 for ids in (student_ids_K, teacher_ids_K))
        return MatchedVocabulary(student_ids_K, teacher_ids_K, *sizes)

    @staticmethod
    def identity(size: int, device: torch.device) -> MatchedVocabulary:
        """For one tokenizer: every entry that both heads have."""
        ids_K = torch.arange(size, device=device)
        return MatchedVocabulary(ids_K, ids_K, size, size)

    def to(self, device: torch.device | str) -> MatchedVocabulary:
        """Copy to `device`."""
        ids = self.student_ids_K.to(device), self.teacher_ids_K.to(device)
        return MatchedVocabulary(*ids, self.student_size, self.teacher_size)


@dataclass
class AlignedTargets:
    """Hidden states of the teacher's response rows, its head, and how they meet the student's."""

    hidden_MD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    groups: Groups
    matched: MatchedVocabulary
    """Only `gold` looks at it."""

    @property
    def num_groups(self) -> int:
        """G of this batch."""
        return self.groups.num_groups

    @staticmethod
    def one_to_one(targets: DenseTargets, student_vocab: int) -> AlignedTargets:
        """Dense targets (one tokenizer) as aligned ones."""
        hidden_ND, weight_VD = targets.hidden_ND, targets.weight_VD
        groups = Groups.one_to_one(len(hidden_ND), hidden_ND.device)
        shared = min(student_vocab, len(weight_VD))
        matched = MatchedVocabulary.identity(shared, weight_VD.device)
        return AlignedTargets(hidden_ND, weight_VD, targets.bias_V, groups, matched)

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """There is no support on which both have log-probs: raises UserError."""
        raise UserError(NEEDS_ALIGNED_LOSS)
