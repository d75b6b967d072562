"""The few types everything hangs on.

Shape legend, used as suffixes throughout: B batch, S sequence, N supervised tokens (targets),
C chunk of targets, D hidden, V vocabulary, K support of a teacher's distribution.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from kd.copies import copier

IGNORE_INDEX = -100


class UserError(ValueError):
    """A mistake its user can mend: shown as one or two plain lines, exit code 2."""


class AgreedError(UserError):
    """One that all ranks know of and end by: nobody waits to be told."""


@dataclass
class Sample:
    """One row: a conversation up to the turn to be learnt, its images, and the reference answer.

    `messages` is in chat format; an image part is `{"type": "image"}` in its place, and the
    k-th image part of the conversation is `images[k]`.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str | None
    kind: str = ""
    """Free label of the row (a question type, say); validation accuracy is also given per kind."""
    dataset: str = ""
    """The name of its data set in a mixture; validation is also given per data set."""

    @property
    def labels(self) -> set[str]:
        """What validation results are also given by."""
        return {self.kind, self.dataset} - {""}


@dataclass
class Rejected:
    """A row that cannot be trained on: named with its reason and counted, never silently lost."""

    id: str
    reason: str
    broken: bool
    """True: the row itself is wrong (unreadable image, no answer); False: too long."""


@dataclass
class Rollout:
    """A response to a sample. `response_ids` are the ids sampled, never decoded and tokenised."""

    sample: Sample
    response_ids: list[int]
    """With the stop id that ended it, if one did."""
    finished: bool
    """False: cut at the most tokens allowed."""
    policy_step: int
    """The optimizer step after which the weights were taken that responded."""
    policy: str = "student"
    """Who responded: student, teacher or dataset."""

    @property
    def is_reference(self) -> bool:
        """Whether it is also learnt by cross-entropy: the student's own samples never are."""
        return self.policy != "student"


@dataclass
class Response:
    """A response as the teacher reads it: in its own rendering and its own tokens."""

    sample: Sample
    prompt_ids: list[int]
    """With image placeholders expanded."""
    response_ids: list[int]

    @functools.cached_property
    def key(self) -> bytes:
        """Of all that a given teacher's word on it depends on: prompt, images and response."""
        images = [
            f"{image.mode} {image.size}".encode() + image.tobytes() for image in self.sample.images
        ]
        return digest(ids_bytes(self.prompt_ids), ids_bytes(self.response_ids), *images)


def ids_bytes(ids: list[int]) -> bytes:
    """Token ids as bytes, for hashing."""
    return array.array("q", ids).tobytes()


def digest(*parts: bytes) -> bytes:
    """16 bytes of several parts; where one ends and the next begins counts."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()


@dataclass
class Inputs:
    """What one model reads: its own rendering of a batch.

    `target_rows_N` are the positions in the flattened [B*S] whose hidden state predicts a target,
    in the order of the rows and, within a row, of the response; found in the collator, because
    searching for them on the device would be a host sync.
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    target_rows_N: Tensor
    media: dict[str, Tensor]
    """Passed verbatim to the model: pixel_values, image_grid_thw, mm_token_type_ids, …"""
    lengths: list[int] | None = None
    """Packed: tokens of the rows that follow each other in one sequence, B = 1, without padding.
    None: every row is a sequence, padded to the longest."""
    position_ids: Tensor | None = None
    """As the model's forward takes them (see `kd.model.Positions`); None: it finds its own."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return dataclasses.replace(
            self,
            input_ids_BS=change(self.input_ids_BS),
            attention_mask_BS=change(self.attention_mask_BS),
            target_rows_N=change(self.target_rows_N),
            media={name: change(x) for name, x in self.media.items()},
            position_ids=None if self.position_ids is None else change(self.position_ids),
        )

    def to(self, device: torch.device | str) -> Inputs:
        """Copy to `device`; the host does not wait for a GPU."""
        return self.map(copier(device))

    def placed(self, position_ids: Tensor | None) -> Inputs:
        """What a model with these positions reads: itself where they are its own."""
        own = self.position_ids
        if own is position_ids or (
            own is not None and position_ids is not None and own.equal(position_ids)
        ):
            return self
        return dataclasses.replace(self, position_ids=position_ids)

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward; packed rows need `position_ids`."""
        mask = {} if self.lengths else {"attention_mask": self.attention_mask_BS}
        found = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids_BS, **mask, **found, **self.media}


class ResponseGroups(Protocol):
    """Where two tokenizers' tokens of the responses of a batch meet (`kd.align.Groups`)."""

    @property
    def num_groups(self) -> int:
        """What the KD term is divided by, summed over the optimizer step."""
        ...

    @property
    def num_student_rows(self) -> int:
        """How many of the N targets are in a group."""
        ...

    def counts(self, lengths: list[int]) -> list[int]:
        """How many groups each response has, of their numbers of targets."""
        ...

    def map(self, change: Callable[[Tensor], Tensor]) -> ResponseGroups:
        """The same with every tensor changed."""
        ...


@dataclass
class Batch:
    """A micro-batch. Both models' renderings meet only at the N response tokens."""

    student: Inputs
    teacher: Inputs
    """Where both render alike (or there is no teacher) the same object as `student`, or its tensors
    with other positions."""
    labels_BS: Tensor
    """The reference token that position [b, s] of the student predicts (already shifted); -100
    elsewhere, also where the student's own sample is only compared with the teacher."""
    labels_N: Tensor
    """Those of the targets: `labels_BS.flatten()[student.target_rows_N]`."""
    rollouts: list[Rollout]
    """The responses, in the order of the rows; a data set's answer is one, too."""
    rejected: list[Rejected] = field(default_factory=list)
    groups: ResponseGroups | None = None
    """None: both have one tokenizer, and meet at every token."""
    num_unaligned: int = 0
    """Responses that have no KD because the two tokenizers do not meet in them."""
    responses: list[Response] = field(default_factory=list)
    """The rollouts as the teacher reads them: its target rows, one response after the other."""
    num_tokens: int = 0
    """Tokens of the rows as the student reads them, without padding and fillers."""

    @property
    def samples(self) -> list[Sample]:
        """What they respond to."""
        return [rollout.sample for rollout in self.rollouts]

    @property
    def num_targets(self) -> int:
        """The number of targets in this batch, known on the host."""
        return self.student.target_rows_N.numel()

    @property
    def num_kd_targets(self) -> int:
        """What the KD term is taken of: every target, or groups of them."""
        return self.num_targets if self.groups is None else self.groups.num_groups

    @property
    def targets_by_rollout(self) -> list[int]:
        """The number of targets of each rollout."""
        return [len(rollout.response_ids) for rollout in self.rollouts]

    @property
    def kd_targets_by_rollout(self) -> list[int]:
        """`num_kd_targets` of each rollout."""
        counts = self.targets_by_rollout
        return counts if self.groups is None else self.groups.counts(counts)

    @property
    def num_aligned(self) -> int:
        """The targets that have a part in the KD term."""
        return self.num_targets if self.groups is None else self.groups.num_student_rows

    @property
    def num_places(self) -> int:
        """Tokens the student reads, padding and fillers included."""
        return self.student.input_ids_BS.numel()

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed, once where both sides have it."""
        student = self.student.map(change)
        if self.teacher is self.student:
            teacher = student
        elif self.teacher.input_ids_BS is self.student.input_ids_BS:
            own = self.teacher.position_ids
            own = None if own is None else change(own)
            teacher = dataclasses.replace(student, position_ids=own)
        else:
            teacher = self.teacher.map(change)
        return dataclasses.replace(
            self,
            student=student,
            teacher=teacher,
            labels_BS=change(self.labels_BS),
            labels_N=change(self.labels_N),
            groups=None if self.groups is None else self.groups.map(change),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Copy all tensors to `device`; the host does not wait for a GPU."""
        return self.map(copier(device))


class Source(Protocol):
    """Where batches come from. `take` never ends: an epoch follows an epoch."""

    def take(self) -> list[Batch]:
        """The micro-batches (CPU) of this rank for the next optimizer step: as many on each."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say of the batches of the last `take`, over all ranks. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the next row; the same on every rank. Collective."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the row that `state` was taken at, also on another world size."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class TeacherTargets(Protocol):
    """A teacher's word on the N target rows of one batch."""

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (student_logp_CK, teacher_logp_CK) of both models on a common support."""
        ...


class Teacher(Protocol):
    """A frozen model, wherever it lives."""

    def expect(self, batches: list[Batch]) -> None:
        """Say which (CPU) batches come next, in order: it may begin to work on them. Collective."""
        ...

    def targets(self, batch: Batch) -> TeacherTargets | None:
        """Targets for the rows `batch.teacher.target_rows_N`; None: there is no teacher.

        Collective, unless the batch is expected by now and the teacher is no model of these ranks.
        """
        ...

    def stop_ids(self, eos_token_id: int) -> list[int]:
        """What ends its responses: the EOS of its tokenizer first, then what its settings add."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say of its work so far, over all ranks. Collective."""
        ...

    def close(self) -> None:
        """Let go of what it holds, with everything written that is to be kept."""
        ...


@dataclass
class DenseTargets:
    """The whole distribution, as hidden states and head; logits exist only chunk by chunk."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None

    def align(
        self, student_logits_CV: Tensor, rows: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Full softmax of both on the vocabulary prefix they share; fp32 (fp64 stays fp64)."""
        teacher_logits_CV = torch.nn.functional.linear(
            self.hidden_ND[rows], self.weight_VD, self.bias_V
        )
        vocab = min(student_logits_CV.shape[-1], teacher_logits_CV.shape[-1])
        dtype = torch.float64 if student_logits_CV.dtype == torch.float64 else torch.float32
        student, teacher = (
            (z[:, :vocab].to(dtype) / temperature).log_softmax(-1)
            for z in (student_logits_CV, teacher_logits_CV)
        )
        return student, teacher
