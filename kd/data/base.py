"""What every data option shares: its settings, its rows, and how a bad row is told of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kd.parallel import cores_per_rank
from kd.types import Rejected, Sample, UserError

SPLITS = ("train", "validation")
ON_BROKEN_ROW = ("raise", "drop")
CORPUS_ROWS = 2000
MOST_WORKERS = 4
"""Of a rank, unless `num_workers` says otherwise."""


class RowError(ValueError):
    """Why a row cannot be used; a `Rejected` before it leaves the data set or the collator."""


class Rows(Protocol):
    """A map-style data set.

    A bad row is returned, not raised: an exception that leaves a worker process arrives wrapped in
    a traceback, and its plain lines are lost.
    """

    def __len__(self) -> int:
        """Number of rows, bad ones included."""
        ...

    def __getitem__(self, index: int) -> Sample | Rejected:
        """Row `index`; always the same for the same index. UserError where none can be had."""
        ...


@dataclass
class DataConfig:
    """Settings that every data option has."""

    num_workers: int | None = None
    """Processes of each rank that load and render rows ahead; 0: in the training process; None: on
    a GPU as many as a rank has cores, at most 4, on a CPU 0."""
    max_length: int = 2048
    """Tokens of prompt + response. A longer row (for either model) is dropped and counted."""
    val_samples: int | None = None
    """Rows of the validation split, a fixed choice; None: all."""
    on_broken_row: str = "raise"
    """`raise` stops at a broken row, `drop` counts it and goes on."""
    shuffle: bool = True
    system_prompt: str | None = None
    """Put before conversations that have no system turn of their own."""

    def validate(self) -> None:
        """Raise UserError on a value that cannot work."""
        if self.on_broken_row not in ON_BROKEN_ROW:
            raise UserError(
                f"data.on_broken_row is '{self.on_broken_row}'; it can be 'raise' or 'drop'."
            )
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"data.num_workers is {self.num_workers}; it cannot be negative.")
        if self.max_length < 2:
            raise UserError(f"data.max_length is {self.max_length}; it must be at least 2 tokens.")
        if self.val_samples is not None and self.val_samples < 1:
            raise UserError(
                f"data.val_samples is {self.val_samples}; give at least 1, or null for all rows."
            )

    def workers(self, device: torch.device) -> int:
        """`num_workers` of a rank that computes on `device`."""
        if self.num_workers is not None:
            return self.num_workers
        # On a CPU they would take the cores that the step itself computes on.
        return min(MOST_WORKERS, cores_per_rank()) if device.type == "cuda" else 0

    @property
    def parts(self) -> list[DataConfig]:
        """The data sets that the rows are from: this one, or those of a mixture."""
        return [self]

    def dataset_names(self, split: str) -> list[str]:
        """What the data sets in the rows of a split are called; only a mixture names them."""
        return []

    def build(self, split: str) -> Rows:
        """The rows of split `train` or `validation`; UserError where the data is not there."""
        raise NotImplementedError

    def corpus(self) -> list[str]:
        """Texts of the first training rows: what a tokenizer made from scratch is trained on."""
        rows = self.build("train")
        samples = [rows[i] for i in range(min(len(rows), CORPUS_ROWS))]
        return [text for s in samples if isinstance(s, Sample) for text in _texts(s)]


def with_system_prompt(messages: list[dict], system_prompt: str | None) -> list[dict]:
    """`messages`, led by a system turn if there is a prompt for one and none in the row."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _texts(sample: Sample) -> list[str]:
    contents = [message["content"] for message in sample.messages]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return [part["text"] for turn in parts for part in turn if "text" in part] + [
        sample.answer or ""
    ]
