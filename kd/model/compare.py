"""What two processors have in common."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kd.types import UserError

ALIGNMENTS = ("auto", "tokens", "bytes")


@dataclass(frozen=True)
class Pairing:
    """How a teacher is compared with a student."""

    by_bytes: bool
    """True: on groups of tokens that spell the same bytes; False: token by token."""
    same_prompts: bool
    """Whether both read the very same rendering of a prompt."""
    reason: str

    def explain(self) -> str:
        """For people."""
        how = "by groups of tokens that spell the same" if self.by_bytes else "token by token"
        prompts = "one rendering for both" if self.same_prompts else "each its own rendering"
        return f"teacher and student are compared {how} ({self.reason}); prompts: {prompts}"


def pair(
    student: ProcessorMixin,
    teacher: ProcessorMixin,
    chat_template_kwargs: tuple[dict, dict],
    alignment: str,
) -> Pairing:
    """Decide it from vocabularies and renderings; `alignment` may force it.

    `chat_template_kwargs` are the student's and the teacher's. Raises UserError where models with
    different tokenizers are forced to be compared token by token.
    """
    difference = tokenizer_difference(student.tokenizer, teacher.tokenizer)
    if alignment == "tokens" and difference:
        raise UserError(
            f"teacher.alignment=tokens, but {difference}: the same id is another token. Choose "
            "auto or bytes, with loss=uld or loss=gold, or a teacher of the student's family"
        )
    ours, theirs = chat_template_kwargs
    same_prompts = difference is None and ours == theirs and same_rendering(student, teacher)
    reason = difference or "one tokenizer"
    if alignment != "auto":
        reason += f", teacher.alignment={alignment}"
    return Pairing(alignment == "bytes" or difference is not None, same_prompts, reason)


def tokenizer_difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> str | None:
    """What makes a token id mean something else to the teacher; None: nothing does.

    The models' vocabularies may be padded differently; the tokenizers must be the same.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differences = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: ours.get(token, theirs.get(token, 0)),
    )
    if differences:
        token = differences[0]
        return (
            f"different tokenizers: {len(ours)} and {len(theirs)} tokens (student, teacher), "
            f"{len(differences)} differ, first {token!r} = {ours.get(token)} and "
            f"{theirs.get(token)}"
        )
    if student.eos_token_id != teacher.eos_token_id:
        return f"different ends of a response: {student.eos_token!r} and {teacher.eos_token!r}"
    return None


def same_rendering(student: ProcessorMixin, teacher: ProcessorMixin) -> bool:
    """Whether both turn a prompt with images into the same model inputs."""
    same_words = student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    return same_words and _rendering(student) == _rendering(teacher)


def _rendering(processor: ProcessorMixin) -> tuple:
    """All but the tokenizer that decides what a prompt is turned into."""
    images = processor.image_processor.to_dict()
    images.pop("image_processor_type", None)
    # Numbers of its own, such as how many tokens stand for an image.
    own = {key: x for key, x in processor.to_dict().items() if not isinstance(x, dict)}
    return type(processor).__name__, processor.chat_template, images, own


def tokenizer_digest(processor: ProcessorMixin) -> str:
    """Equal where a token id means the same, in `tokenizer_difference`'s sense."""
    tokenizer = processor.tokenizer
    return _digest([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])


def rendering_digest(processor: ProcessorMixin, chat_template_kwargs: dict) -> str:
    """Equal where prompts with images are turned into the same tokens and pixels."""
    return _digest([_rendering(processor), chat_template_kwargs])


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
