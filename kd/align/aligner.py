"""One response, as both models read it."""

from __future__ import annotations

from dataclasses import dataclass

from kd.align.alignment import Alignment, align, matched_vocabulary, teacher_response
from kd.align.targets import MatchedVocabulary
from kd.align.tokens import TokenBytes, Unaligned
from kd.types import Rollout


@dataclass
class AlignedResponse:
    """The tokens of both sides, and where they meet."""

    student_ids: list[int]
    teacher_ids: list[int]
    alignment: Alignment
    """Without a group where the sides cannot be aligned: such a response has no KD."""
    problem: str | None = None
    """Why not."""


@dataclass
class Aligner:
    """For a teacher with another tokenizer than the student's."""

    student: TokenBytes
    teacher: TokenBytes

    def __call__(self, rollout: Rollout, answer_ids: list[int] | None) -> AlignedResponse:
        """The response on both sides: the ids sampled are the truth on the side that sampled them.

        `answer_ids` is the data set's answer in the teacher's tokenizer, for a rollout of it.
        """
        ids = rollout.response_ids
        if rollout.policy == "teacher":
            other = teacher_response(ids, self.teacher, self.student)
            if isinstance(other, Unaligned):  # nothing that the student could learn
                return AlignedResponse([], [], Alignment([]), other.reason)
            return self._aligned(other, ids)
        if answer_ids is not None:
            return self._aligned(ids, answer_ids)
        other = teacher_response(ids, self.student, self.teacher)
        if isinstance(other, Unaligned):
            return AlignedResponse(ids, [], Alignment([]), other.reason)
        return self._aligned(ids, other)

    def _aligned(self, student_ids: list[int], teacher_ids: list[int]) -> AlignedResponse:
        found = align(student_ids, teacher_ids, self.student, self.teacher)
        if isinstance(found, Unaligned):
            return AlignedResponse(student_ids, [], Alignment([]), found.reason)
        return AlignedResponse(student_ids, teacher_ids, found)

    def matched(self) -> MatchedVocabulary:
        """The tokens that are the same in both vocabularies."""
        return MatchedVocabulary.of(*matched_vocabulary(self.student, self.teacher))
