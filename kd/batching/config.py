"""The `batching` options: how the rows of an optimizer step become micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from kd.batching.batches import BudgetBatches, Collate, FixedBatches
from kd.batching.divide import Layout, Packed, Padded
from kd.model import Reader, check_packing
from kd.parallel import World
from kd.types import Batch, Inputs, Rejected, Sample, UserError

PROBE_PX = ((64, 64), (96, 64))


@dataclass
class BatchingConfig:
    """Base of the options. The rows of a step are `train.global_batch_size`, however divided."""

    def validate(self, max_length: int) -> None:
        """Refuse values out of range; `max_length` is the tokens of the longest row."""

    @property
    def packs(self) -> bool:
        """Whether models read several rows in one sequence."""
        return False

    def tokens_at_once(self, micro_batch_size: int, max_length: int) -> int:
        """The most that a rank reads in a micro-batch."""
        raise NotImplementedError

    def accumulates(self, micro_batch_size: int, grad_accum: int) -> bool:
        """Whether a rank may read the rows of an optimizer step as several micro-batches."""
        return micro_batch_size * grad_accum > 1

    def check(self, collate: Collate, readers: dict[str, Reader], world: World) -> None:
        """Raise UserError where a model of `readers` (by side) cannot read such batches.

        Collective.
        """

    def build(
        self, collate: Collate, micro_batch_size: int, grad_accum: int, world: World
    ) -> FixedBatches | BudgetBatches:
        """What divides the `micro_batch_size` x `grad_accum` rows of a rank."""
        raise NotImplementedError


@dataclass
class FixedBatching(BatchingConfig):
    """train.micro_batch_size rows each, in their order, padded."""

    def tokens_at_once(self, micro_batch_size: int, max_length: int) -> int:
        """See the base class."""
        return micro_batch_size * max_length

    def accumulates(self, micro_batch_size: int, grad_accum: int) -> bool:
        """See the base class."""
        return grad_accum > 1

    def build(
        self, collate: Collate, micro_batch_size: int, grad_accum: int, world: World
    ) -> FixedBatches:
        """See the base class."""
        return FixedBatches(collate, micro_batch_size, grad_accum)


@dataclass
class BudgetBatching(BatchingConfig):
    """What both options with a budget have in common."""

    max_tokens: int = 2048
    """Tokens that a rank reads at once, those of images included; ${data.max_length}: as many as
    the longest row has."""

    def validate(self, max_length: int) -> None:
        """Refuse values out of range."""
        if self.max_tokens < max_length:
            raise UserError(
                f"batching.max_tokens={self.max_tokens} is less than data.max_length={max_length}: "
                "a row of that length would fit into no micro-batch; raise the one or lower the "
                "other"
            )

    def tokens_at_once(self, micro_batch_size: int, max_length: int) -> int:
        """See the base class."""
        return self.max_tokens

    def layout(self, filler_length: int) -> Layout:
        """How a micro-batch is read."""
        raise NotImplementedError

    def build(
        self, collate: Collate, micro_batch_size: int, grad_accum: int, world: World
    ) -> BudgetBatches:
        """See the base class."""
        layout = self.layout(collate.filler_length)
        return BudgetBatches(collate, layout, self.max_tokens, micro_batch_size * grad_accum, world)


@dataclass
class TokenBudgetBatching(BudgetBatching):
    """Rows of similar length together, as many as `max_tokens` hold, padding counted."""

    max_padding: float = 0.05
    """Share of a micro-batch. Rows that differ by more are read apart, however few they are."""

    def validate(self, max_length: int) -> None:
        """Refuse values out of range."""
        super().validate(max_length)
        if not 0 <= self.max_padding < 1:
            raise UserError(f"batching.max_padding={self.max_padding}: a share, in [0, 1)")

    def layout(self, filler_length: int) -> Layout:
        """See the base class."""
        return Padded(filler_length, self.max_padding)


@dataclass
class PackedBatching(BudgetBatching):
    """Rows one after the other in one sequence of at most `max_tokens`, without padding."""

    @property
    def packs(self) -> bool:
        """See the base class."""
        return True

    def layout(self, filler_length: int) -> Layout:
        """See the base class."""
        return Packed(filler_length)

    def check(self, collate: Collate, readers: dict[str, Reader], world: World) -> None:
        """See the base class. Measured, on two rows with an image each."""
        rows = collate.prepare([_probe(number) for number in range(len(PROBE_PX))])
        for row in rows:
            if isinstance(row, Rejected):
                raise UserError(f"batching=packed cannot be tried on small images: {row.reason}")
        batches = collate.batch(rows[1:]), collate.batch(rows), collate.batch(rows, packed=True)
        for side, read in readers.items():
            check_packing(read, *(_inputs(batch, side, world.device) for batch in batches), side)


def _probe(number: int) -> Sample:
    # Noise: of a picture in one colour no model could tell what is where.
    generator = torch.Generator().manual_seed(number)
    width, height = PROBE_PX[number]
    pixels_HWC = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    messages = [{"role": "user", "content": content}]
    return Sample("probe", messages, [Image.fromarray(pixels_HWC.numpy())], "Nothing but noise.")


def _inputs(batch: Batch, side: str, device: torch.device) -> Inputs:
    return (batch.teacher if side == "teacher" else batch.student).to(device)
