"""What the checks before the first step find, on real models that are made wrong on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForImageTextToText, AutoProcessor

from kd.config import VlmKDConfig, register, to_object, validate
from kd.data import Rows
from kd.data.mixture import MixedRows
from kd.doctor import ROWS_READ, Check, Doctor, Result, check_kernels, feature_token
from kd.model import FrozenVLM
from kd.run import config_dir
from kd.types import Sample, UserError
from recipes.vlm_kd import VlmKD
from tests.model.families import FAMILIES, write
from tests.model.kernel_standins import with_kernels, without_kernels


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teacher") / "export"


@pytest.fixture
def teacher(train, kept) -> Path:
    if not kept.exists():
        options = ["student=digits_small", "optim.lr=0.01", "doctor=never"]
        (train("digits_teacher", "teacher", *options) / "export").rename(kept)
    return kept


ASKED = [{"role": "user", "content": [{"type": "text", "text": "Which digit?"}]}]


def blinded(teacher: Path, folder: Path) -> Path:
    """The same model, with a vision tower that gives the same for every image."""
    model = AutoModelForImageTextToText.from_pretrained(teacher)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embed" in name:
                parameter.zero_()
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(teacher).save_pretrained(folder)
    return folder


def test_a_sound_run_passes_and_is_not_started(kd_main, teacher, tmp_path, capsys):
    options = [f"teacher.name={teacher}", f"run.dir={tmp_path / 'none'}", "doctor=only"]
    kd_main("--config-name", "digits_kd", *options)
    table = capsys.readouterr().err
    for name in ("labels", "end of a response", "teacher = student", "teacher sees images"):
        (line,) = (line for line in table.splitlines() if name in line)
        assert "passed" in line
    assert not (tmp_path / "none").exists()


def test_a_blind_teacher_ends_the_run_before_its_first_step(train, teacher, tmp_path, capsys):
    blind = blinded(teacher, tmp_path / "blind")
    with pytest.raises(SystemExit) as exit_:
        train("digits_kd", "kd", f"teacher.name={blind}")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "error: doctor: teacher sees images: its divergence moves by up to 0.0e+00" in error
    assert "it answers without looking" in error
    assert not list((tmp_path / "runs" / "kd").glob("checkpoints/step_*"))
    train("digits_kd", "kd", f"teacher.name={blind}", "doctor=never", "train.max_steps=2")


def test_the_checks_change_nothing(train, teacher):
    options = [f"teacher.name={teacher}", "train.max_steps=2"]
    runs = [train("digits_kd", mode, *options, f"doctor={mode}") for mode in ("auto", "never")]
    losses = [
        [line.split(', "train/step_s"')[0].split('"train/lr"')[0] for line in lines]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in runs)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_images_are_those_that_features_replace(family):
    config, processor = FAMILIES[family]()
    assert feature_token(processor) == config.image_token_id


def test_all_tokens_of_an_image_are_counted(kd_main, tmp_path, capsys):
    """Four of each here, beside the mark before it."""
    write("gemma3", tmp_path / "model")
    options = ["student=pretrained", f"student.name={tmp_path / 'model'}", "data.num_workers=0"]
    options += [f"teacher.name={tmp_path / 'model'}", "doctor=only", "data.max_length=1024"]
    kd_main("--config-name", "digits_kd", f"run.dir={tmp_path / 'none'}", *options)
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if "image tokens (student)" in line)
    assert "16 tokens for 4 images" in line


@pytest.fixture
def recipe(teacher):
    made = []

    def make(*overrides: str, name: str = "digits_kd") -> VlmKD:
        register()
        with initialize_config_dir(config_dir(), version_base="1.3"):
            config = compose(name, overrides=[f"teacher.name={teacher}", *overrides])
        typed = to_object(config)
        assert isinstance(typed, VlmKDConfig)
        validate(typed)
        world = typed.parallel.build()
        made.append(world)
        return VlmKD(typed, world)

    yield make
    for world in made:
        world.close()


def test_a_model_that_is_not_the_same_twice(recipe, capsys):
    made = recipe()
    noisy = made.student.model.get_decoder().layers[0]
    noisy.register_forward_hook(lambda _, __, out: out + 0.5 * torch.randn_like(out))
    with pytest.raises(UserError, match=r"doctor: teacher = student: divergence of at most"):
        made.examine()


def checks_of(made: VlmKD, rows: Rows | None = None) -> dict[str, Check]:
    doctor = Doctor(
        made.rows if rows is None else rows,
        made.collator,
        made.student,
        made.judge,
        teacher_sees_new_rows=True,
        world=made.world,
    )
    return {check.name: check for check in doctor()}


def test_answers_that_the_tokenizer_cannot_spell(recipe):
    made = recipe()
    made.processor.tokenizer.backend_tokenizer.normalizer = Lowercase()
    rows = [Sample(str(i), [*ASKED], [], answer) for i, answer in enumerate(("two", "A Seven"))]
    check = checks_of(made, rows)["labels"]
    assert check.result is Result.warning
    assert check.finding == "'A Seven' comes back from its tokens as 'a seven'"
    assert checks_of(made, rows[:1])["labels"].result is Result.passed


def test_prompts_without_a_place_for_their_images(recipe, teacher, tmp_path):
    processor = AutoProcessor.from_pretrained(teacher)
    assert "<|image_pad|>" in processor.chat_template
    processor.chat_template = processor.chat_template.replace("<|image_pad|>", "")
    processor.save_pretrained(tmp_path / "blind")
    blind = tmp_path / "blind"
    made = recipe(f"student.processor.name={blind}", f"teacher.processor.name={blind}")
    (check,) = checks_of(made).values()
    assert (check.name, check.result) == ("rows", Result.warning)
    assert "the first rows are unusable" in check.finding and "<|image_pad|>" in check.finding


def test_a_template_that_closes_a_turn_otherwise(recipe, teacher, tmp_path):
    processor = AutoProcessor.from_pretrained(teacher)
    assert "<|im_end|>\n" in processor.chat_template
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "<|endoftext|>")
    processor.save_pretrained(tmp_path / "other")
    other = tmp_path / "other"
    made = recipe(f"student.processor.name={other}", f"teacher.processor.name={other}")
    check = checks_of(made)["end of a response"]
    assert check.result is Result.warning
    assert "responses end with <|im_end|>, the chat template closes a turn with" in check.finding


def test_every_data_set_of_a_mixture_is_looked_at(recipe, teacher):
    """The first one has no images, and the rows of another are too long."""
    made = recipe(
        *("data=mixture", "data.num_workers=0", "data.max_length=100"),
        *("+data@data.datasets.a=digits", "data.datasets.a.kinds=[recite,add]"),
        *("+data@data.datasets.b=digits", "data.datasets.b.kinds=[which]"),
        *("+data@data.datasets.c=digits", f"data.datasets.c.system_prompt='{'look ' * 100}'"),
        *("+data.weights={a:1,b:1,c:1}", "student=digits_small", "parallel=fsdp"),
        f"student.processor.name={teacher}",
        name="qwen_vl_kd",
    )
    checks = checks_of(made)
    assert checks["rows"].finding.startswith("in c: the first rows are unusable (c/")
    assert "more than data.max_length 100" in checks["rows"].finding
    assert checks["labels"].finding == "in a, b: they decode to the answers"
    assert checks["image tokens (student)"].finding == "in b: 8 tokens for 2 images"
    assert checks["teacher sees images"].result is Result.passed
    blind = dict(made.judge.vlm.named_parameters())
    with torch.no_grad():
        for name in (name for name in blind if "patch_embed" in name):
            blind[name].zero_()
    check = checks_of(made)["teacher sees images"]
    assert check.result is Result.failed
    assert check.finding.startswith("in b: its divergence moves by up to 0.0e+00")


def test_each_data_set_is_told_of_where_several_are_wrong(recipe):
    made = recipe()
    made.processor.tokenizer.backend_tokenizer.normalizer = Lowercase()
    sound = [Sample(str(i), [*ASKED], [], "two") for i in range(ROWS_READ)]
    parts = [sound, [Sample("0", [*ASKED], [], "A Six")], [Sample("0", [*ASKED], [], "A Seven")]]
    rows = MixedRows(["sound", "six", "seven"], parts, weights=[1, 1, 1], shuffles=[True] * 3)
    check = checks_of(made, rows)["labels"]
    assert check.result is Result.warning
    assert check.finding == (
        "in six: 'A Six' comes back from its tokens as 'a six'; "
        "in seven: 'A Seven' comes back from its tokens as 'a seven'"
    )
    sights = checks_of(made, rows)["image tokens"]
    assert (sights.result, sights.finding) == (Result.skipped, f"no image in {ROWS_READ} rows")


HYBRID = (
    "student.architecture.text_config.layer_types=[linear_attention,full_attention,full_attention]"
)


def test_linear_attention_without_its_kernels_is_refused_on_a_gpu(recipe, monkeypatch, capsys):
    """The device is one in name only: the run is refused before anything is computed."""
    without_kernels(monkeypatch)
    made = recipe(HYBRID)
    assert "fused layers (student)" not in checks_of(made), "on a CPU nothing is asked"
    made.world = replace(made.world, device=torch.device("cuda"))
    with pytest.raises(UserError) as error:
        made.examine()
    assert str(error.value) == (
        "doctor: fused layers (student): its linear attention runs in plain PyTorch: no "
        "flash-linear-attention and no causal-conv1d is installed\n"
        "pip install flash-linear-attention causal-conv1d, or go on without: doctor=never"
    )


def test_layers_with_and_without_kernels(monkeypatch):
    """By stand-ins for the kernels; a convolution without its own is no more than slower."""
    without_kernels(monkeypatch)
    plain, short, full = (
        FrozenVLM(AutoModelForImageTextToText.from_config(FAMILIES[name]()[0]))
        for name in ("qwen3_5_hybrid", "lfm2_vl", "qwen3_vl")
    )
    with_kernels(monkeypatch)
    fused = FrozenVLM(plain.model)
    checks = check_kernels([plain, short, full, None, fused], "cuda")
    assert [check.result for check in checks] == [Result.failed, Result.warning, Result.passed]
    assert {check.name for check in checks} == {"fused layers (teacher)"}
    assert checks[1].finding.startswith("its short convolutions run in plain PyTorch: no causal-")
    assert checks[2].finding == "by causal_conv1d, fla"
    assert check_kernels([plain, short], "cpu") == []
