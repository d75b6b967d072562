"""Whole runs from a teacher of one family to a student of another, on rows with and without images.

Their tokenizers, chat templates, image processors and numbers of image tokens all differ.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from kd.data import Renderer
from kd.types import Sample
from tests.conftest import metrics
from tests.model.families import FAMILIES, write

PAIRS = [
    ("qwen3_5_hybrid", "lfm2_vl"),
    ("gemma3", "qwen3_vl"),
    ("internvl", "idefics3"),
    ("llava_onevision", "mistral3"),
]
ANSWERS = {"red": "A red square.", "blue": "A blue circle.", None: "What is in the picture?"}


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """Overrides of qwen_vl_kd: rows with one image, with two and with none, each in two sizes."""
    lines = []
    for i in range(16):
        color, count = ("red", "blue")[i % 2], (1, 1, 0, 2)[i // 2 % 4]
        name = f"{color}_{32 + 32 * (i // 8)}.png"
        Image.new("RGB", (64, 32 + 32 * (i // 8)), color).save(tmp_path / name)
        images = [{"type": "image", "path": name}] * count
        content = [*images, {"type": "text", "text": "What is in the picture?"}]
        answer = ANSWERS[color if count else None]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return [
        *("student=pretrained", "student.export_dtype=float32", "parallel=fsdp"),
        *("data=conversations", f"data.path={tmp_path / 'rows.jsonl'}", "data.num_workers=0"),
        *("data.val_samples=null", "train.global_batch_size=8", "train.micro_batch_size=8"),
        *("train.save_every=null", "optim.lr=0.02", "optim.schedule=constant"),
    ]


def values(run: Path, key: str) -> list[float]:
    """Of all steps."""
    return list(metrics(run, key).values())


def check_finite_and_aligned(run: Path, coverage: float) -> None:
    for key in ("train/loss", "train/ce", "train/kd", "train/grad_norm"):
        assert all(map(math.isfinite, values(run, key))), key
    assert all(norm > 0 for norm in values(run, "train/grad_norm"))
    assert mean(values(run, "align/coverage")) >= coverage


@pytest.mark.parametrize("families", PAIRS, ids=" to ".join)
def test_a_student_of_another_family_learns(train, base, tmp_path, caplog, families):
    caplog.set_level("INFO", logger="kd")
    teacher, student = (tmp_path / family for family in families)
    write(families[0], teacher, seed=1)
    write(families[1], student, seed=0)
    ce = [*base, "teacher=none", "kd_ratio=0", f"student.name={teacher}", "train.max_steps=15"]
    ce.append("doctor=never")
    teacher = train("qwen_vl_kd", "teacher", *ce) / "export"
    base += ["teacher=local", f"teacher.name={teacher}", "teacher.dtype=float32"]

    for loss in ("gold", "uld"):
        reads = ["kd_ratio=0.5", "train.max_steps=8", f"student.name={student}", f"loss={loss}"]
        run = train("qwen_vl_kd", loss, *base, *reads)
        assert "by groups of tokens that spell the same (different tokenizers: " in caplog.text
        check_finite_and_aligned(run, coverage=1)
        assert set(values(run, "align/unaligned")) == {0}
        for key in ("train/loss", "train/kd", "train/ce"):
            losses = values(run, key)
            assert mean(losses[-2:]) < 0.8 * mean(losses[:2]), key

        # Its export goes on: a student that can spell some words already.
        own = ["kd_ratio=1", "rollout=student", f"student.name={run / 'export'}", f"loss={loss}"]
        own += ["rollout.window_steps=2", "rollout.sampling.max_new_tokens=8", "optim.lr=0.003"]
        own += ["doctor=never", "rollout.sampling.temperature=0.7"]
        run = train("qwen_vl_kd", f"{loss}_own", *base, *own)
        check_finite_and_aligned(run, coverage=0.8)
        AutoModelForImageTextToText.from_pretrained(run / "export")
        if loss == "uld":  # gold's is too flat here to fall in so few steps
            assert mean(values(run, "train/kd")[-2:]) < mean(values(run, "train/kd")[:2])


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_images_that_leave_no_room_end_the_run(train, base, tmp_path, capsys, rollout):
    """Where that is so for all rows; a prompt is never cut."""
    for family in ("smolvlm", "idefics3"):
        write(family, tmp_path / family)
    options = ["teacher=local", f"teacher.name={tmp_path / 'smolvlm'}", "loss=gold"]
    options += [f"rollout={rollout}", "kd_ratio=1", "data.max_length=20"]
    if rollout == "student":
        options.append("rollout.sampling.max_new_tokens=4")
    with pytest.raises(SystemExit) as exit_:
        train("qwen_vl_kd", "long", *base, f"student.name={tmp_path / 'idefics3'}", *options)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "rows in succession, a whole epoch, could be used. The first ones: " in error
    assert re.search(
        r"more than data\.max_length 20 \(\d\d of them for images: raise it, or", error
    )


def image_tokens(processor: ProcessorMixin) -> int:
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    image = Image.new("RGB", (64, 64))
    sample = Sample("a", [{"role": "user", "content": content}], [image], None)
    return int((Renderer(processor).prompt(sample).ids_S == processor.image_token_id).sum())


@pytest.mark.parametrize(
    ("teacher", "settings", "loss"),
    [
        ("smolvlm", "do_image_splitting: false", "gold"),
        ("idefics3", "size: {longest_edge: 128}", "jsd"),
    ],
    ids=["another family", "the same family"],
)
def test_each_side_sees_images_in_its_own_way(
    train, base, tmp_path, caplog, teacher, settings, loss
):
    """With settings for each; the student's are in what is exported."""
    caplog.set_level("INFO", logger="kd")
    write(teacher, tmp_path / "teacher", seed=1)
    write("idefics3", tmp_path / "student")
    run = train(
        "qwen_vl_kd",
        "run",
        *base,
        *("teacher=local", f"teacher.name={tmp_path / 'teacher'}", "teacher.dtype=float32"),
        *(f"student.name={tmp_path / 'student'}", f"loss={loss}", "train.max_steps=4"),
        "+student.processor.image={size: {longest_edge: 32}}",
        f"+teacher.processor.image={{{settings}}}",
    )
    assert "prompts: each its own rendering" in caplog.text
    check_finite_and_aligned(run, coverage=1 if loss == "gold" else 0)
    own = AutoProcessor.from_pretrained(tmp_path / "student")
    assert (image_tokens(own), image_tokens(AutoProcessor.from_pretrained(run / "export"))) == (
        20,
        4,
    )


@pytest.mark.parametrize("families", PAIRS, ids=" to ".join)
def test_the_tokenizers_of_a_pair_split_the_answers_otherwise(families):
    renderers = [Renderer(FAMILIES[family]()[1]) for family in families]
    student, teacher = ([len(r.response(answer)) for answer in ANSWERS.values()] for r in renderers)
    assert student != teacher
