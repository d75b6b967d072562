from __future__ import annotations

from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from kd.data import MedPixConfig
from kd.types import Rejected, UserError

FEATURES = Features({"image_id": Image(), "question": Value("string"), "answer": Value("string")})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder laid out as the hub data set is: 6 training rows, one of them broken, 4 others."""
    rows = [
        {
            "image_id": PILImage.new("RGB", (40 + n, 30), "red"),
            "question": f"What is seen in image {n}?",
            "answer": "" if n == 5 else f"Finding {n}.",
        }
        for n in range(10)
    ]
    dataset = Dataset.from_list(rows, features=FEATURES)
    (tmp_path / "data").mkdir()
    dataset.select(range(6)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    dataset.select(range(6, 10)).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    return tmp_path


def test_rows_are_image_question_answer(folder):
    rows = MedPixConfig(path=str(folder)).build("train")
    sample = rows[3]
    assert len(rows) == 6
    assert sample.images[0].size == (43, 30)
    assert sample.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert sample.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What is seen in image 3?"},
    ]
    assert sample.answer == "Finding 3."


def test_validation_is_the_other_split(folder):
    rows = MedPixConfig(path=str(folder), val_samples=3).build("validation")
    answers = [rows[i].answer for i in range(len(rows))]
    assert len(answers) == 3
    assert set(answers) < {f"Finding {n}." for n in range(6, 10)}


def test_row_without_an_answer_is_broken(folder):
    row = MedPixConfig(path=str(folder)).build("train")[5]
    assert isinstance(row, Rejected)
    assert row.id == f"{folder.name}:5"
    assert "not both text" in row.reason


def test_missing_column_is_named(folder):
    config = MedPixConfig(path=str(folder), image_column="image")
    with pytest.raises(UserError, match="no column image; it has image_id, question, answer"):
        config.build("train")


def test_hub_out_of_reach_is_told_in_plain_lines(monkeypatch):
    # Their offline switches, read from the environment at import.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        MedPixConfig(revision="v9").build("train")
    (line,) = str(caught.value).splitlines()
    assert "Cannot load split 'train' of data set 'mmoukouba/MedPix-VQA' at revision v9" in line
    assert "set data.path to a local copy" in line
