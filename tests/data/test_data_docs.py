"""What docs/data.md shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kd.config import register, to_object
from kd.data import Collator, ConversationsConfig, DataConfig, MixtureConfig, Renderer
from kd.run import config_dir
from kd.types import Sample
from tests.test_docs import option, write_own_configs

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, png, monkeypatch) -> Path:
    """A folder with the files that the page speaks of; the working directory."""
    png("images/red.png", "red"), png("images/blue.png", "blue")
    (tmp_path / "rows.jsonl").write_text("".join(blocks("jsonl")))
    (tmp_path / "validation.jsonl").write_text(blocks("jsonl")[0])
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
    write_own_configs("data.md")
    return tmp_path


def config(command: str) -> DataConfig:
    """The data config that a command line of the page composes."""
    words = shlex.split(command.replace("\\\n", " "))
    overrides = [word for word in words if "=" in word]
    if own := option(words, "--config-dir"):
        overrides.append(f"hydra.searchpath=[file://{Path(own).absolute()}]")
    register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return to_object(compose(option(words, "--config-name"), overrides=overrides)).data


@pytest.mark.parametrize("command", blocks("bash"))
def test_commands_give_usable_rows(folder, command, processor):
    rows = config(command).build("train")
    collate = Collator(Renderer(processor), None, 1024, lockstep=False)
    batch = collate([rows[i] for i in range(min(len(rows), 8))])
    assert batch.rejected == []
    assert batch.num_targets > 0


def test_mixtures_of_the_page_are_alike(folder):
    first, second = (config(c) for c in blocks("bash") if "mixture" in c or "mine_and" in c)
    assert isinstance(first, MixtureConfig) and isinstance(second, MixtureConfig)
    assert first.weights == second.weights
    assert first.build("train").sizes == second.build("train").sizes


def test_page_shows_rows_of_every_form(folder):
    rows = ConversationsConfig(path="rows.jsonl", val_fraction=0).build("train")
    samples = [rows[i] for i in range(len(rows))]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [len(sample.images) for sample in samples] == [1, 0, 2, 1]
    assert [sample.answer for sample in samples][2:] == ["It is red.", "Red."]


def test_validation_command_reads_the_other_file(folder):
    (command,) = [c for c in blocks("bash") if "validation_path" in c]
    assert len(config(command).build("validation")) == 1
