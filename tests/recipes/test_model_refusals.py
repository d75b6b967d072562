"""Models and processors that cannot be distilled end a run at its start, in plain words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoProcessor, MllamaConfig, Qwen3Config, Qwen3ForCausalLM

from tests.model.families import write


@pytest.fixture
def refusal(train, tmp_path, capsys) -> Callable[..., str]:
    """What a run of an idefics3 student on digits says, with exit code 2, from `error:` on."""

    def run(*overrides: str) -> str:
        write("idefics3", tmp_path / "student")
        student = ["student=pretrained", f"student.name={tmp_path / 'student'}"]
        with pytest.raises(SystemExit) as exit_:
            train("digits_kd", "refused", *student, "data.max_length=1024", *overrides)
        assert exit_.value.code == 2
        printed = capsys.readouterr().err
        error = printed[printed.index("error: ") :].strip()
        assert len(error.splitlines()) <= 2
        assert "Traceback" not in printed
        return error

    return run


def text_only(folder: Path) -> None:
    """A language model with the tokenizer of one that reads images."""
    write("qwen3_vl", folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for file in folder.iterdir():
        file.unlink()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def test_a_text_only_teacher(refusal, tmp_path):
    text_only(tmp_path / "teacher")
    error = refusal(f"teacher.name={tmp_path / 'teacher'}", "loss=gold")
    assert f"{tmp_path / 'teacher'} (qwen3) has no image part: kd needs a model that" in error


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_processor_without_an_image_part(refusal, tmp_path, side):
    text_only(tmp_path / "text")
    write("smolvlm", tmp_path / "teacher")
    error = refusal(
        f"teacher.name={tmp_path / 'teacher'}",
        *("loss=gold", f"{side}.processor.name={tmp_path / 'text'}"),
    )
    assert f"cannot load {tmp_path / 'text'}: the folder holds no processor with an image" in error


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_a_loss_token_by_token_between_two_tokenizers(refusal, tmp_path, loss):
    write("lfm2_vl", tmp_path / "teacher")
    error = refusal(f"teacher.name={tmp_path / 'teacher'}", f"loss={loss}")
    assert "teacher and student have different tokenizers: 342 and 324 tokens" in error
    assert "choose loss=uld or loss=gold, or a teacher of the student's family" in error


def test_tokens_one_by_one_between_two_tokenizers(refusal, tmp_path):
    write("lfm2_vl", tmp_path / "teacher")
    error = refusal(
        *(f"teacher.name={tmp_path / 'teacher'}", "loss=gold", "teacher.alignment=tokens")
    )
    assert "teacher.alignment=tokens, but different tokenizers: " in error
    assert "Choose auto or bytes, with loss=uld or loss=gold" in error


def test_image_settings_that_a_model_does_not_have_or_cannot_read(refusal, tmp_path):
    write("smolvlm", tmp_path / "teacher")
    teacher = [f"teacher.name={tmp_path / 'teacher'}", "loss=gold"]
    error = refusal(*teacher, "+teacher.processor.image.max_tiles=4")
    assert "processor.image.max_tiles is no setting of its SmolVLMImageProcessor" in error
    error = refusal(*teacher, "+student.processor.image={max_image_size: {longest_edge: 64}}")
    assert "Idefics3ForConditionalGeneration cannot read what its processor makes" in error
    assert "only their number can be set" in error
    error = refusal(*teacher, "student.processor.max_pixels=4096")
    assert "Idefics3ImageProcessor has no pixel bounds" in error


def test_a_model_that_reads_images_otherwise(refusal, tmp_path):
    MllamaConfig().save_pretrained(tmp_path / "teacher")
    error = refusal(f"teacher.name={tmp_path / 'teacher'}", "loss=gold")
    assert "(mllama) sees its images by cross-attention" in error
