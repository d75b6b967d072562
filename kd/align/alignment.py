"""The same response in two tokenizers: where both end a token, a group closes."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.align.tokens import TokenBytes, Unaligned

Group = tuple[int, int, int, int]
"""(student_start, student_len, teacher_start, teacher_len), in tokens of the response."""


@dataclass(frozen=True)
class Alignment:
    """The groups of one response; they cover all tokens of both sides once and in order."""

    groups: list[Group]


def align(
    student_ids: list[int], teacher_ids: list[int], student: TokenBytes, teacher: TokenBytes
) -> Alignment | Unaligned:
    """Group the tokens of a response by the byte offsets at which both sides end a token.

    A stop id that ends the student's side goes with the one that ends the teacher's, and a
    response that was cut ends with one on neither. Tokens that spell nothing (the space before
    the text, alone) join the group before them, or the first. With a WordPiece tokenizer the
    offsets are those of the text without whitespace, in its case and accents.

    Unaligned where the two sides spell different bytes, or hold tokens that spell none.
    """
    student_text, student_ended = student.split(student_ids)
    teacher_text, teacher_ended = teacher.split(teacher_ids)
    if student_ended != teacher_ended:
        return Unaligned("only one side of the response has an end")
    ends = _common_ends(student_text, teacher_text, student, teacher)
    if isinstance(ends, Unaligned):
        return ends
    groups = _close(*ends)
    if isinstance(groups, Unaligned):
        return groups
    if student_ended:
        groups.append((len(student_text), 1, len(teacher_text), 1))
    return Alignment(groups)


def _common_ends(
    student_ids: list[int], teacher_ids: list[int], student: TokenBytes, teacher: TokenBytes
) -> tuple[list[int], list[int]] | Unaligned:
    """The offsets at which the tokens of each side end, in the text that both spell."""
    sides = student.spell(student_ids), teacher.spell(teacher_ids)
    for side in sides:
        if isinstance(side, Unaligned):
            return side
    folds = [side for side in (student, teacher) if not side.is_exact]
    readings = (s.readings(x) for s, x in zip((student, teacher), sides, strict=True))
    for pair in itertools.product(*readings):
        try:
            (text, ends), (other, other_ends) = (_ends(pieces, folds) for pieces in pair)
        except UnicodeDecodeError:
            return Unaligned("the response is not valid UTF-8")
        if text == other:
            return ends, other_ends
    return Unaligned("the two tokenizers spell the response differently")


def _ends(pieces: list[bytes], folds: list[TokenBytes]) -> tuple[bytes, list[int]]:
    """The text and where each piece ends in it; folded for tokenizers that are not exact."""
    text, ends = b"".join(pieces), list(itertools.accumulate(map(len, pieces)))
    if not folds:
        return text, ends
    characters = text.decode()
    folded = list(characters)
    for side in folds:
        folded = ["".join(map(side.fold, c)) for c in folded]
    # A character's fold counts from its last byte on.
    places = [0, *itertools.accumulate(len(c.encode()) for c in characters)]
    lengths = [0, *itertools.accumulate(len(c.encode()) for c in folded)]
    at = [lengths[bisect.bisect_right(places, end) - 1] for end in ends]
    return "".join(folded).encode(), at


def _close(student_ends: list[int], teacher_ends: list[int]) -> list[Group] | Unaligned:
    """One group for each offset at which both sides end a token; 0 is none: nothing is spelt."""
    if not any(student_ends) and bool(student_ends) != bool(teacher_ends):
        return Unaligned("one side of the response is empty")
    groups, s, t = [], 0, 0
    offsets = sorted((set(student_ends) & set(teacher_ends)) - {0})
    if student_ends and not offsets:
        offsets = [0]
    for offset in offsets:
        s_end = bisect.bisect_right(student_ends, offset)
        t_end = bisect.bisect_right(teacher_ends, offset)
        groups.append((s, s_end - s, t, t_end - t))
        s, t = s_end, t_end
    return groups


def teacher_response(
    student_ids: list[int], student: TokenBytes, teacher: TokenBytes
) -> list[int] | Unaligned:
    """The teacher's ids for a response that the student sampled.

    They are the text of the student's tokens in the teacher's tokenizer, and its EOS if any of
    the student's stop ids ended the response. Unaligned where the tokens are no valid UTF-8, such
    as a response that was cut within a character, or hold special tokens other than that end.
    """
    ids, ended = student.split(student_ids)
    pieces = student.spell(ids)
    if isinstance(pieces, Unaligned):
        return pieces
    try:
        text = b"".join(student.readings(pieces)[0]).decode()
    except UnicodeDecodeError:
        return Unaligned("the response is not valid UTF-8: it holds, or ends in, half a character")
    teacher_ids = teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*teacher_ids, teacher.eos_id] if ended else list(teacher_ids)


def matched_vocabulary(student: TokenBytes, teacher: TokenBytes) -> tuple[Tensor, Tensor]:
    """(student_ids_K, teacher_ids_K): pairs of tokens that spell the same, each token once.

    EOS goes with EOS whatever they are called, and other special tokens with those of the same
    name. Of several tokens of one vocabulary that spell the same, the first is matched, but no
    byte of a fallback where there is a piece. int64, in the order of the student's ids.
    """
    ours, theirs = _keys(student), _keys(teacher)
    pairs = sorted((i, theirs[key]) for key, i in ours.items() if key in theirs)
    ids_K2 = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return ids_K2[:, 0].contiguous(), ids_K2[:, 1].contiguous()


def _keys(side: TokenBytes) -> dict[bytes | str, int]:
    """By what each token is matched: its bytes, a special token's name, "" for the EOS."""
    keys: dict[bytes | str, int] = {"": side.eos_id}
    single = {i: p for i, p in enumerate(side.bytes_of) if i in side.byte_tokens}
    pieces = {i: p for i, p in enumerate(side.bytes_of) if i not in side.byte_tokens}
    for i, piece in (pieces | single).items():
        key = side.specials.get(i) if piece is None else piece
        if key and i != side.eos_id:
            keys.setdefault(key, i)
    return keys
