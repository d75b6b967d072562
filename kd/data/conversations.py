"""The user's own conversations, with images in any turn or none. See docs/data.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.data.base import SPLITS
from kd.data.images import ImageLoader
from kd.data.messages import Parsed, images_first, parse_conversation
from kd.data.rows import TableRows, column, validation_choice
from kd.data.streamed import StreamableConfig
from kd.data.tables import Table
from kd.types import UserError


@dataclass
class ConversationsConfig(StreamableConfig):
    """Rows with a `messages` column; the last assistant turn is learnt, the others are context."""

    path: str = ""
    """A .jsonl or .parquet file, a glob of such, a folder of Parquet files, or owner/name."""
    split: str = "train"
    """Of a folder or hub data set."""
    revision: str | None = None
    """Of a hub data set: a commit, tag or branch."""
    validation_path: str | None = None
    validation_split: str | None = None
    """Of `validation_path`, or of `path` where that is not given."""
    val_fraction: float = 0.05
    """Without either of them, so much of `path` is held out, always the same rows."""
    messages_column: str = "messages"
    images_column: str = "images"
    """May be missing, from all rows or some."""
    id_column: str | None = None
    """Names rows in messages; None: file and line."""
    kind_column: str | None = None
    """Validation accuracy is also given per value of it."""
    require_answer: bool = True
    """False: a row may end without an answer; rollouts can use it as a prompt."""
    images_first: bool = False
    """True: all images of a row move to the front of its first user turn."""
    image_root: str | None = None
    """What image paths are relative to; None: the folder of the data file."""
    allow_http: bool = False
    http_timeout_s: float = 20.0
    max_image_pixels: int = 50_000_000
    max_image_bytes: int = 50_000_000

    def validate(self) -> None:
        """Raise UserError on a value that cannot work."""
        super().validate()
        if not self.path:
            raise UserError("data.path is not set. Give a file, a folder, a glob or owner/name.")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction is {self.val_fraction}; it is at least 0, below 1.")
        if self.max_image_pixels < 1 or self.max_image_bytes < 1 or self.http_timeout_s <= 0:
            raise UserError(
                "data.max_image_pixels, max_image_bytes, http_timeout_s must be above 0."
            )

    def build(self, split: str) -> TableRows:
        """Rows of split `train` or `validation`; UserError where the data is not there."""
        self.validate()
        assert split in SPLITS, split
        if self.has_own_validation:
            training = split == "train"
            path = self.path if training else self.validation_path or self.path
            table = self._open(
                path, self.split if training else self.validation_split or self.split
            )
        else:
            train, held_out = self._open(self.path, self.split).held_out(self.val_fraction)
            table = train if split == "train" else held_out
            if len(held_out) == 0 and split == "validation":
                raise UserError(
                    f"data.val_fraction {self.val_fraction} of {len(train)} rows leaves no row to "
                    "validate on. Raise it, or set data.validation_path or data.validation_split."
                )
        if split == "validation":
            table = validation_choice(table, self.val_samples)
        return self._rows(table)

    def parse(self, row: dict[str, Any]) -> Parsed:
        """The conversation in a row; RowError with what is wrong."""
        messages = column(row, self.messages_column)
        images = row.get(self.images_column)
        parsed = parse_conversation(messages, images, require_answer=self.require_answer)
        if not self.images_first:
            return parsed
        return replace(parsed, messages=images_first(parsed.messages))

    @property
    def has_own_validation(self) -> bool:
        """Whether the validation rows are others than those held out of `path`."""
        return self.validation_path is not None or self.validation_split is not None

    def _open(self, path: str, split: str) -> Table:
        optional = [self.images_column, self.id_column, self.kind_column]
        return self.open_table(
            path,
            split,
            self.revision,
            required=[self.messages_column],
            optional=[name for name in optional if name is not None],
        )

    def _rows(self, table: Table) -> TableRows:
        images = ImageLoader(
            Path(self.image_root) if self.image_root else table.root,
            self.allow_http,
            self.max_image_pixels,
            self.max_image_bytes,
            self.http_timeout_s,
        )
        return TableRows(
            table,
            self.parse,
            images,
            id_column=self.id_column,
            kind_column=self.kind_column,
            system_prompt=self.system_prompt,
        )
