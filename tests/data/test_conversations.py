"""Users' rows from real files: what is accepted, and what is said of the rest."""

from __future__ import annotations

import base64
import http.server
import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from kd.data import Collator, ConversationsConfig, Renderer
from kd.types import Rejected, Sample, UserError

ASK = {"type": "text", "text": "Which digit is this?"}
ANSWER = {"role": "assistant", "content": "The digit is one."}
COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def turn(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, ASK]}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def load(tmp_path: Path, row: Any, **settings: Any) -> Sample | Rejected:
    """The only row of a JSONL file."""
    path = write(tmp_path / "rows.jsonl", [row])
    return ConversationsConfig(path=path, val_fraction=0, **settings).build("train")[0]


def colors(sample: Sample | Rejected) -> list[str]:
    assert isinstance(sample, Sample), sample
    assert all(image.mode == "RGB" for image in sample.images)
    names = {rgb: name for name, rgb in COLORS.items()}
    return [names[image.getpixel((0, 0))] for image in sample.images]


def reason(row: Sample | Rejected) -> str:
    assert isinstance(row, Rejected), row
    assert row.broken
    return row.reason


def image_parts(sample: Sample | Rejected) -> list[int]:
    """Per turn, how many image parts it has."""
    assert isinstance(sample, Sample), sample
    return [
        sum(part == {"type": "image"} for part in message["content"])
        for message in sample.messages
        if isinstance(message["content"], list)
    ]


def png_bytes(color: str) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (64, 64), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_column_fills_bare_parts_in_order(tmp_path, png):
    png("a.png", "red"), png("sub/b.png", "green"), png("c.png", "blue")
    bare = {"type": "image"}
    row = {
        "messages": [turn(bare, bare), {"role": "assistant", "content": "A."}, turn(bare), ANSWER],
        "images": ["a.png", "sub/b.png", str(tmp_path / "c.png")],
    }
    sample = load(tmp_path, row)
    assert colors(sample) == ["red", "green", "blue"]
    assert image_parts(sample) == [2, 1]
    assert sample.answer == "The digit is one."
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize("form", ["image", "path", "url", "file", "data", "bytes", "image_url"])
def test_part_with_its_own_reference(tmp_path, png, form):
    path = png("a.png", "green")
    encoded = base64.b64encode(png_bytes("green")).decode()
    uri = f"data:image/png;base64,{encoded}"
    part = {
        "image": {"type": "image", "image": "a.png"},
        "path": {"type": "image", "path": str(path)},
        "url": {"type": "image", "url": "a.png"},
        "file": {"type": "image", "url": path.as_uri()},
        "data": {"type": "image", "image": uri},
        "bytes": {"type": "image", "bytes": encoded},
        "image_url": {"type": "image_url", "image_url": {"url": uri}},
    }[form]
    sample = load(tmp_path, {"messages": [turn(part), ANSWER]})
    assert colors(sample) == ["green"]
    assert image_parts(sample) == [1]


def test_own_references_and_column_mix(tmp_path, png):
    png("a.png", "red"), png("b.png", "blue")
    parts = [{"type": "image", "path": "a.png"}, {"type": "image"}]
    sample = load(tmp_path, {"messages": [turn(*parts), ANSWER], "images": ["b.png"]})
    assert colors(sample) == ["red", "blue"]


def test_images_first(tmp_path, png):
    png("a.png", "red"), png("b.png", "green"), png("c.png", "blue")
    bare = {"type": "image"}
    messages = [
        {"role": "system", "content": "Be brief."},
        turn(bare),
        {"role": "assistant", "content": "One."},
        turn({"type": "image", "path": "c.png"}, bare),
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
        ANSWER,
    ]
    row = {"messages": messages, "images": ["a.png", "b.png"]}
    sample, as_given = load(tmp_path, row, images_first=True), load(tmp_path, row)
    assert colors(sample) == colors(as_given) == ["red", "blue", "green"]
    assert image_parts(as_given) == [1, 2]
    messages[1], messages[3] = turn(bare, bare, bare), turn()
    assert sample.messages == messages[:-1]


def test_images_first_in_a_turn_of_text(tmp_path, png):
    png("a.png", "red"), png("b.png", "green")
    bare = {"type": "image"}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": [ASK, bare, {"type": "text", "text": "Or this?"}, bare]},
        ANSWER,
    ]
    row = {"messages": messages, "images": ["a.png", "b.png"]}
    sample = load(tmp_path, row, images_first=True)
    assert colors(sample) == ["red", "green"]
    assert sample.messages == [
        {"role": "user", "content": [bare, bare, {"type": "text", "text": "Look."}]},
        messages[1],
        {"role": "user", "content": [ASK, {"type": "text", "text": "Or this?"}]},
    ]


def test_images_first_leaves_rows_that_have_none_to_move(tmp_path, png):
    png("a.png", "red")
    text = {"messages": [{"role": "user", "content": "Odd or even?"}, ANSWER]}
    first = {"messages": [turn({"type": "image"}), ANSWER], "images": ["a.png"]}
    for row in (text, first):
        sample = load(tmp_path, row, images_first=True, system_prompt="Be brief.")
        assert sample.messages[1:] == row["messages"][:1]


def test_images_first_needs_a_user_turn(tmp_path, png):
    png("a.png")
    row = {
        "messages": [{"role": "system", "content": [{"type": "image"}]}, ANSWER],
        "images": ["a.png"],
    }
    assert "no user turn" in reason(load(tmp_path, row, images_first=True))


def test_plain_text_rows(tmp_path):
    messages = [{"role": "user", "content": "Odd or even?"}, ANSWER]
    sample = load(tmp_path, {"messages": messages}, system_prompt="Be brief.")
    assert sample.images == []
    assert sample.messages == [{"role": "system", "content": "Be brief."}, messages[0]]


def test_answer_given_in_parts(tmp_path):
    parts = [{"type": "text", "text": "The digit "}, {"type": "text", "text": "is one."}]
    row = {"messages": [turn(), {"role": "assistant", "content": parts}]}
    assert load(tmp_path, row).answer == "The digit is one."


def test_image_root_and_column_names(tmp_path, png):
    png("pictures/a.png", "blue")
    row = {
        "name": "r7",
        "group": "easy",
        "chat": [turn({"type": "image"}), ANSWER],
        "pics": ["a.png"],
    }
    sample = load(
        tmp_path,
        row,
        messages_column="chat",
        images_column="pics",
        id_column="name",
        kind_column="group",
        image_root=str(tmp_path / "pictures"),
    )
    assert colors(sample) == ["blue"]
    assert (sample.id, sample.kind) == ("r7 (rows.jsonl:1)", "easy")


def test_images_are_turned_upright(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", (60, 20)).save(tmp_path / "a.jpg", exif=exif)
    sample = load(tmp_path, {"messages": [turn({"type": "image"}), ANSWER], "images": ["a.jpg"]})
    assert sample.images[0].size == (20, 60)


PARQUET_ROWS = [
    {"messages": [turn({"type": "image"}), ANSWER], "images": ["red"]},
    {"messages": [turn(), ANSWER], "images": []},
    {"messages": [turn({"type": "image"}, {"type": "image"}), ANSWER], "images": ["green", "blue"]},
]


def parquet_dataset(images: Any) -> Dataset:
    """Rows as a Parquet file has them: parts have all keys, answers as well are lists of parts."""
    part = {"type": Value("string"), "text": Value("string")}
    turns = List({"role": Value("string"), "content": List(part)})
    rows = [
        {
            "messages": [
                {
                    "role": t["role"],
                    "content": [{"type": "text", "text": t["content"]}]
                    if isinstance(t["content"], str)
                    else [{"text": None, **p} for p in t["content"]],
                }
                for t in row["messages"]
            ],
            "images": [{"bytes": png_bytes(color), "path": None} for color in row["images"]],
        }
        for row in PARQUET_ROWS
    ]
    return Dataset.from_list(rows, features=Features({"messages": turns, "images": images}))


STRUCT = List({"bytes": Value("binary"), "path": Value("string")})


@pytest.mark.parametrize("images", [List(Image()), STRUCT], ids=["Image", "struct"])
@pytest.mark.parametrize("where", ["file", "glob", "folder"])
def test_parquet_with_embedded_images(tmp_path, images, where):
    dataset = parquet_dataset(images)
    dataset.select([0, 1]).to_parquet(tmp_path / "train-0.parquet")
    dataset.select([2]).to_parquet(tmp_path / "train-1.parquet")
    path = {"file": "train-0.parquet", "glob": "train-*.parquet", "folder": ""}[where]
    rows = ConversationsConfig(path=str(tmp_path / path), val_fraction=0).build("train")
    expected = [["red"], [], ["green", "blue"]][: len(rows)]
    assert len(rows) == (2 if where == "file" else 3)
    assert [colors(rows[i]) for i in range(len(rows))] == expected
    assert rows[0].answer == "The digit is one."
    assert rows[0].messages == [turn({"type": "image"})]


def test_folder_has_splits(tmp_path):
    dataset = parquet_dataset(STRUCT)
    dataset.select([0, 1]).to_parquet(tmp_path / "train-0.parquet")
    dataset.select([2]).to_parquet(tmp_path / "validation-0.parquet")
    config = ConversationsConfig(path=str(tmp_path), validation_split="validation")
    assert [len(config.build(split)) for split in ("train", "validation")] == [2, 1]
    with pytest.raises(UserError, match="split 'dev'"):
        ConversationsConfig(path=str(tmp_path), validation_split="dev").build("validation")


def test_messages_as_json_text(tmp_path, png):
    png("a.png")
    text = json.dumps([turn({"type": "image"}), ANSWER])
    Dataset.from_list([{"messages": text, "images": ["a.png"]}]).to_parquet(tmp_path / "r.parquet")
    config = ConversationsConfig(path=str(tmp_path / "r.parquet"), val_fraction=0)
    assert colors(config.build("train")[0]) == ["red"]


def numbered(count: int) -> list[Any]:
    return [{"messages": [{"role": "user", "content": f"{n}?"}, ANSWER]} for n in range(count)]


def questions(config: ConversationsConfig, split: str) -> list[str]:
    rows = config.build(split)
    return [rows[i].messages[0]["content"] for i in range(len(rows))]


def test_held_out_fraction_is_fixed_and_disjoint(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(40))
    config = ConversationsConfig(path=path, val_fraction=0.25)
    train, validation = questions(config, "train"), questions(config, "validation")
    assert (len(train), len(validation)) == (30, 10)
    assert set(train) | set(validation) == {f"{n}?" for n in range(40)}
    few = ConversationsConfig(path=path, val_fraction=0.25, val_samples=4)
    assert set(questions(few, "validation")) < set(validation)
    assert questions(few, "validation") == questions(few, "validation")
    assert questions(few, "train") == train


def test_validation_file_of_its_own(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(8))
    other = write(tmp_path / "val.jsonl", numbered(2))
    config = ConversationsConfig(path=path, validation_path=other)
    assert [len(config.build(split)) for split in ("train", "validation")] == [8, 2]


def test_several_jsonl_files_with_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n" + json.dumps(numbered(1)[0]) + "\n\n")
    write(tmp_path / "b.jsonl", numbered(2))
    rows = ConversationsConfig(path=str(tmp_path / "*.jsonl"), val_fraction=0).build("train")
    assert [rows[i].id for i in range(len(rows))] == ["a.jsonl:3", "b.jsonl:1", "b.jsonl:2"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be `width` by `height`."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


ONE_IMAGE = [turn({"type": "image"}), ANSWER]
VIDEO = {"type": "video", "video": "v.mp4"}
BROKEN: dict[str, tuple[Any, str]] = {
    "not json": ('{"messages": [', "not JSON"),
    "not an object": ("[1, 2]", "not an object"),
    "no column": ({"text": "x"}, "column 'messages' is missing or empty; there is text"),
    "no turns": ({"messages": []}, "'messages' is missing|not a list of turns"),
    "other layout": ({"messages": [{"from": "human", "value": "x"}]}, "turn 0 has no role"),
    "only an answer": ({"messages": [ANSWER]}, "nothing comes before"),
    "no answer": ({"messages": [turn()]}, "no answer: the last turn is the user's"),
    "empty answer": ({"messages": [turn(), {"role": "assistant", "content": ""}]}, "no answer"),
    "too few images": ({"messages": ONE_IMAGE}, "0 images .* but 1 image parts"),
    "too many images": ({"messages": ONE_IMAGE, "images": ["a", "b"]}, "2 images .* but 1 image"),
    "video": ({"messages": [turn(VIDEO), ANSWER]}, "turn 0 has a part that is no text.*'video'"),
    "missing file": ({"messages": ONE_IMAGE, "images": ["gone.png"]}, "gone.png cannot be read"),
    "corrupt": ({"messages": ONE_IMAGE, "images": ["corrupt.png"]}, "cannot be decoded"),
    "cut off": ({"messages": ONE_IMAGE, "images": ["cut.png"]}, "cannot be decoded"),
    "bomb": ({"messages": ONE_IMAGE, "images": ["bomb.png"]}, "9000x9000 pixels, more than"),
    "16 bits": ({"messages": ONE_IMAGE, "images": ["deep.png"]}, "convert it to 8 bits"),
    "not base64": ({"messages": ONE_IMAGE, "images": ["data:image/png;base64,!"]}, "not base64"),
    "web": ({"messages": ONE_IMAGE, "images": ["http://h/a.png"]}, "data.allow_http=true"),
    "number": ({"messages": ONE_IMAGE, "images": [7]}, "an image is given as int"),
}


@pytest.fixture
def bad_images(tmp_path) -> None:
    (tmp_path / "corrupt.png").write_bytes(b"these are no pixels")
    (tmp_path / "cut.png").write_bytes(png_bytes("red")[:80])
    (tmp_path / "bomb.png").write_bytes(bomb(9000, 9000))
    PILImage.new("I;16", (32, 32)).save(tmp_path / "deep.png")


@pytest.mark.usefixtures("bad_images")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_is_named_with_its_reason(tmp_path, name):
    row, says = BROKEN[name]
    path = write(tmp_path / "rows.jsonl", [numbered(1)[0], row])
    rejected = ConversationsConfig(path=path, val_fraction=0).build("train")[1]
    assert rejected.id == "rows.jsonl:2"
    assert re.search(says, reason(rejected)), reason(rejected)


def test_file_size_limit(tmp_path, png):
    png("a.png")
    row = {"messages": ONE_IMAGE, "images": ["a.png"]}
    assert "more than 50" in reason(load(tmp_path, row, max_image_bytes=50))


def test_prompts_without_answers_can_be_allowed(tmp_path):
    sample = load(tmp_path, {"messages": [turn()]}, require_answer=False)
    assert sample.answer is None
    assert len(sample.messages) == 1


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    handler = partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_from_the_web(tmp_path, png, web):
    png("a.png", "blue")
    row = {"messages": ONE_IMAGE, "images": [f"{web}/a.png"]}
    assert colors(load(tmp_path, row, allow_http=True)) == ["blue"]
    limited = load(tmp_path, row, allow_http=True, max_image_bytes=50)
    assert "more than 50 bytes" in reason(limited)
    gone = {"messages": ONE_IMAGE, "images": [f"{web}/gone.png"]}
    assert "404" in reason(load(tmp_path, gone, allow_http=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "data.path is not set"),
        ({"path": "gone.jsonl"}, "no data at 'gone.jsonl'"),
        ({"path": "data/gone/*.parquet"}, "no data at"),
        ({"path": __file__}, r"is \.py; it can be \.jsonl or \.parquet"),
        ({"path": "x.jsonl", "val_fraction": 1.0}, "data.val_fraction"),
        ({"path": "x.jsonl", "max_image_bytes": 0}, "max_image_bytes"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        ConversationsConfig(**settings).build("train")


def test_validation_that_cannot_be_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(10))
    with pytest.raises(UserError, match="leaves no row to validate on"):
        ConversationsConfig(path=path, val_fraction=0).build("validation")
    with pytest.raises(UserError, match=r"data\.val_samples is 6, but the validation split has 5"):
        ConversationsConfig(path=path, val_fraction=0.5, val_samples=6).build("validation")


def test_parquet_without_the_column_is_refused(tmp_path):
    Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(UserError, match="no column messages; it has text"):
        ConversationsConfig(path=str(tmp_path / "r.parquet")).build("train")


def test_rows_of_every_form_make_one_batch(tmp_path, png, processor):
    png("a.png")
    rows = [
        {"messages": ONE_IMAGE, "images": ["a.png"]},
        numbered(1)[0],
        {"messages": ONE_IMAGE, "images": ["gone.png"]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    data = ConversationsConfig(path=path, val_fraction=0).build("train")
    batch = Collator(Renderer(processor), None, 256, lockstep=False)([data[i] for i in range(3)])
    assert [s.id for s in batch.samples] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert [r.id for r in batch.rejected] == ["rows.jsonl:3"]
    assert processor.tokenizer.decode(batch.labels_N) == "The digit is one.<|im_end|>" * 2
