"""Every shipped YAML composes, converts and validates; the shipped runs also plan themselves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from kd.config import OPTIONS, register
from kd.config_dflash import DFLASH_OPTIONS, register_dflash
from kd.run import checked

CONFIGS = Path(__file__).parents[2] / "configs"
HOST = "qwen_vl_kd"  # sets nothing of `data`, so that any option fits into it
DRAFT_HOST = "dflash"
SCHEMAS = OPTIONS | DFLASH_OPTIONS

# What an option leaves to its user.
NEEDS = {
    "student/pretrained": ["student.name=folder"],
    "teacher/local": ["teacher.name=folder"],
    "teacher/server": ["teacher.name=folder"],
    "teacher/engine/kd": ["teacher=server", "teacher.name=folder"],
    "teacher/engine/vllm": ["teacher=server", "teacher.name=folder"],
    "teacher/cached": ["teacher.source.name=folder"],
    "teacher/none": ["kd_ratio=0"],
    "data/conversations": ["data.path=rows.jsonl"],
    "data/mixture": ["+data@data.datasets.mine=digits", "+data.weights={mine:1}"],
    "rollout/student": ["kd_ratio=1"],
    "rollout/engine/hf": ["rollout=student", "kd_ratio=1"],
    "rollout/engine/vllm": ["rollout=student", "kd_ratio=1"],
    "target/pretrained": ["target.name=folder"],
}
# The root config that an experiment is made for, where that is not HOST.
EXPERIMENT_HOSTS = {
    "digits_ce": "digits_kd",
    "digits_cross": "digits_kd",
    "digits_talker": "digits_teacher",
    "qwen3_5_4b_dflash": DRAFT_HOST,
    "qwen3_vl_8b_dflash": DRAFT_HOST,
}

SERVE = "serve"  # of kd.serve, see tests/serve
ROOTS = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {SERVE})
FILES = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/**/*.yaml")
)
EXPERIMENTS = [name for name in FILES if name.startswith("experiment/")]
GROUP_OPTIONS = [name for name in FILES if name not in EXPERIMENTS]


def composed(root: str, *overrides: str) -> Any:
    """As `kd.run` does it: composed, converted, validated."""
    register()
    register_dflash()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return checked(compose(root, overrides=list(overrides)))


def yaml(name: str) -> DictConfig:
    """The file itself."""
    content = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert isinstance(content, DictConfig)
    return content


def schema_of(name: str) -> type:
    """The dataclass that heads the defaults list of a group's YAML."""
    group, schema = name.rpartition("/")[0], yaml(name).defaults[0]
    return SCHEMAS[group][schema.removesuffix("_schema")]


def test_there_are_configs():
    assert HOST in ROOTS and len(ROOTS) > 2 and EXPERIMENTS


@pytest.mark.parametrize("root", ROOTS)
def test_root_configs(root):
    config = composed(root)
    assert config.run.name == root, "two root configs must not share a run directory"
    first, *_, last = yaml(root).defaults
    assert first.endswith("_schema")
    assert last == {"experiment": None}, "an experiment must win over its root config"


@pytest.mark.parametrize("name", GROUP_OPTIONS)
def test_group_options(name):
    group, _, option = name.rpartition("/")
    host = DRAFT_HOST if group in DFLASH_OPTIONS else HOST
    config = composed(host, f"{group}={option}", *NEEDS.get(name, []))
    chosen = functools.reduce(getattr, group.split("/"), config)
    assert type(chosen) is schema_of(name)


@pytest.mark.parametrize("name", GROUP_OPTIONS)
def test_values_belong_to_the_schema(name):
    content = yaml(name)
    *nested, last = content.pop("defaults")[1:]
    assert last == "_self_" and all(isinstance(entry, DictConfig) for entry in nested)
    OmegaConf.merge(OmegaConf.structured(schema_of(name)), content)  # raises on a key it lacks


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name):
    experiment = name.split("/")[1]
    host = EXPERIMENT_HOSTS.get(experiment, HOST)
    config = composed(host, f"experiment={experiment}")
    assert config.run.name == experiment
    values = OmegaConf.to_container(yaml(name))
    assert isinstance(values, dict)
    values.pop("defaults", None)
    assert OmegaConf.merge(OmegaConf.structured(config), values) == OmegaConf.structured(config), (
        "the root config wins over the experiment"
    )
    header = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert header == "# @package _global_"


def test_every_schema_has_a_yaml_and_every_group_a_schema():
    groups = {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("**/") if path != CONFIGS}
    assert groups == {*SCHEMAS, "experiment"}
    for group, schemas in SCHEMAS.items():
        shipped = {schema_of(name) for name in GROUP_OPTIONS if name.rpartition("/")[0] == group}
        assert shipped == set(schemas.values())


def test_groups_bear_the_name_of_what_they_configure():
    modules = {"student": "model", "target": "dflash", "draft": "dflash"}
    for group, schemas in SCHEMAS.items():
        module = modules.get(group.split("/")[0], group.split("/")[0])
        for schema in schemas.values():
            assert schema.__module__.split(".")[:2] == ["kd", module]


# Weights in float32: 4 bytes for each of the student's parameters, divided among the ranks.
@pytest.mark.parametrize(("nproc", "weights"), [(1, "16.91 GiB"), (8, "2.11 GiB")])
def test_dry_run_of_the_large_models(kd_main, capsys, tmp_path, monkeypatch, nproc, weights):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runs = tmp_path / "runs"
    kd_main("--config-name", HOST, "dry_run=true", f"run.dir={runs}", f"parallel.nproc={nproc}")
    rows = table(capsys.readouterr().out)
    assert rows["student parameters"] == "4.539 B"
    assert rows["of them trained"] == "4.206 B"  # without the frozen vision tower
    assert rows["teacher parameters"] == "9.410 B"
    assert rows["student weights (float32, sharded)"] == weights
    assert rows["rows per optimizer step"] == "16"
    assert not runs.exists()


# The sizes that the models are published with.
@pytest.mark.parametrize(
    ("experiment", "student", "trained", "teacher"),
    [
        ("qwen3_vl_8b_to_2b_jsd_vllm", "2.128 B", "1.721 B", "8.767 B"),
        ("qwen3_vl_8b_to_lfm2_vl", "1.585 B", "1.187 B", "8.767 B"),
        ("qwen3_vl_30b_a3b_to_2b", "2.128 B", "1.721 B", "31.071 B"),
    ],
)
def test_dry_run_of_the_experiments(
    kd_main, capsys, tmp_path, monkeypatch, experiment, student, trained, teacher
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runs = tmp_path / "runs"
    overrides = ["dry_run=true", f"run.dir={runs}", "parallel.nproc=8"]
    kd_main("--config-name", HOST, f"experiment={experiment}", *overrides)
    rows = table(capsys.readouterr().out)
    assert rows["student parameters"] == student
    assert rows["of them trained"] == trained
    assert rows["teacher parameters"] == teacher
    assert not runs.exists()


# Depth and taps of the drafts that were published for targets as deep (docs/dflash.md).
@pytest.mark.parametrize(
    ("experiment", "target", "draft", "taps"),
    [
        ("qwen3_5_4b_dflash", "4.539 B", "0.518 B", "[1, 8, 15, 22, 29]"),
        ("qwen3_vl_8b_dflash", "8.767 B", "1.049 B", "[1, 9, 17, 25, 33]"),
    ],
)
def test_dry_run_of_the_drafts(
    kd_main, capsys, tmp_path, monkeypatch, experiment, target, draft, taps
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runs = tmp_path / "runs"
    overrides = ["dry_run=true", f"run.dir={runs}", "parallel.nproc=8"]
    kd_main("--config-name", DRAFT_HOST, f"experiment={experiment}", *overrides)
    rows = table(capsys.readouterr().out)
    assert rows["target parameters"] == target
    assert rows["draft parameters, trained"] == draft
    assert rows["layers of the target tapped"] == taps
    assert not runs.exists()


@pytest.mark.parametrize("arguments", [["digits_teacher"], ["digits_kd", "experiment=digits_ce"]])
def test_dry_run_of_the_digits(kd_main, capsys, tmp_path, arguments):
    kd_main("--config-name", *arguments, "dry_run=true", f"run.dir={tmp_path / 'runs'}")
    rows = table(capsys.readouterr().out)
    assert rows["teacher parameters"] == "0.000 B"
    assert not (tmp_path / "runs").exists()


def table(printed: str) -> dict[str, str]:
    """Name -> value of the rows of a printed plan."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return dict(cells)
