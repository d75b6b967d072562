"""What two processors have in common."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kd.types import UserError


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    The models' vocabularies may be padded differently; the tokenizers must be the same.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differences = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: ours.get(token, theirs.get(token, 0)),
    )
    if differences:
        token = differences[0]
        raise UserError(
            f"teacher and student have different tokenizers: {len(ours)} and {len(theirs)} tokens "
            f"(student, teacher), {len(differences)} differ, first {token!r} = "
            f"{ours.get(token)} and {theirs.get(token)}\n"
            "A dense divergence compares token by token: choose a teacher of the student's family"
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise UserError(
            f"teacher and student end a response with different tokens: {student.eos_token!r} and "
            f"{teacher.eos_token!r} (student, teacher)"
        )


def same_rendering(student: ProcessorMixin, teacher: ProcessorMixin) -> bool:
    """Whether both turn a prompt with images into the same model inputs."""

    def identity(processor: ProcessorMixin) -> tuple:
        images = processor.image_processor.to_dict()
        images.pop("image_processor_type", None)
        # Numbers of its own, such as how many tokens stand for an image.
        own = {key: x for key, x in processor.to_dict().items() if not isinstance(x, dict)}
        return processor.chat_template, images, own, processor.tokenizer.get_vocab()

    return type(student) is type(teacher) and identity(student) == identity(teacher)
