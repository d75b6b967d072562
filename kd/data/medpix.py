"""MedPix-VQA: questions about radiology images, one image each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd.data.base import SPLITS, RowError
from kd.data.images import ImageLoader
from kd.data.messages import Parsed
from kd.data.rows import TableRows, column, validation_choice
from kd.data.streamed import StreamableConfig


@dataclass
class MedPixConfig(StreamableConfig):
    """A table of image, question and answer, on the hub or in a folder of the same layout."""

    path: str = "mmoukouba/MedPix-VQA"
    """owner/name on the hub, or a local folder with its Parquet files."""
    revision: str | None = None
    """A commit, tag or branch of the hub data set."""
    train_split: str = "train"
    validation_split: str = "validation"
    image_column: str = "image_id"
    question_column: str = "question"
    answer_column: str = "answer"
    max_image_pixels: int = 50_000_000
    max_image_bytes: int = 50_000_000

    def build(self, split: str) -> TableRows:
        """Rows of split `train` or `validation`; UserError where the data cannot be had."""
        self.validate()
        assert split in SPLITS, split
        training = split == "train"
        source_split = self.train_split if training else self.validation_split
        columns = [self.image_column, self.question_column, self.answer_column]
        table = self.open_table(self.path, source_split, self.revision, columns, [])
        if not training:
            table = validation_choice(table, self.val_samples)
        images = ImageLoader(
            table.root, False, self.max_image_pixels, self.max_image_bytes, timeout_s=1.0
        )
        return TableRows(table, self.parse, images, system_prompt=self.system_prompt)

    def parse(self, row: dict[str, Any]) -> Parsed:
        """Image, then question; RowError where a part of the row is missing."""
        question, answer = (
            column(row, name) for name in (self.question_column, self.answer_column)
        )
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise RowError("question and answer are not both text")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        image = column(row, self.image_column)
        return Parsed([{"role": "user", "content": content}], [image], answer)
