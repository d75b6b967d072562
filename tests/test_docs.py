"""What the pages say exists: links, commands, config keys, files of one's own."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import typing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd import plan
from kd.config import OPTIONS, VlmKDConfig, register, typed_object
from kd.config_dflash import DFLASH_OPTIONS, DFlashConfig, register_dflash
from kd.run import checked, config_dir
from kd.serve.config import ServerConfig
from kd.serve.config import register as register_server

REPO = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text()
    for path in (REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted(REPO.glob("docs/*.md")))
}


def fenced(page: str, language: str) -> list[str]:
    """The blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every command line in the page's bash blocks."""
    lines = "".join(fenced(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands_of(module: str) -> list[object]:
    """Page and arguments of everything that starts `-m module`."""
    return [
        pytest.param(page, words[words.index(module) + 1 :], id=f"{page}: {shlex.join(words)}")
        for page in PAGES
        for words in commands(page)
        if module in words
    ]


def points(overrides: list[str]) -> list[tuple[str, ...]]:
    """The single runs that the overrides of a command stand for."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{o.get_key_element()}={o.value().start}"]
        if o.is_interval_sweep()
        else [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    return list(itertools.product(*values))


def write_own_configs(page: str) -> None:
    """The YAML blocks headed by the name of a file, below the working directory."""
    for block in fenced(page, "yaml"):
        if match := re.match(r"(?:# @.*\n)?# (\S+\.yaml)\n", block):
            path = Path(match[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)


def option(arguments: list[str], name: str) -> str | None:
    """The value of a `--name value` or `--name=value`."""
    joined = shlex.join(arguments).replace(f"{name} ", f"{name}=")
    match = re.search(rf"{name}=(\S+)", joined)
    return match[1] if match else None


@pytest.mark.parametrize(("page", "arguments"), commands_of("kd.run") + commands_of("kd.cache"))
def test_commands_compose_and_validate(page, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_own_configs(page)
    name, own = option(arguments, "--config-name"), option(arguments, "--config-dir")
    assert name is not None
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    main, other = Path(config_dir()), Path(own).absolute() if own else None
    if other is not None and (other / f"{name}.yaml").exists():
        main, other = other, main
    search = [f"hydra.searchpath=[file://{other}]"] if other else []
    runs = points(overrides)
    assert len(runs) == 1 or {"-m", "--multirun"} & set(arguments)
    register()
    register_dflash()
    with initialize_config_dir(str(main), version_base="1.3"):
        for run in runs:
            checked(compose(name, overrides=[*search, *run]))


@pytest.mark.parametrize(("page", "arguments"), commands_of("kd.plan"))
def test_commands_of_plans_compose_and_validate(page, arguments):
    args = plan.parser().parse_intermixed_args(arguments)
    register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        checked(compose(args.config_name, overrides=args.overrides))


@pytest.mark.parametrize(("page", "arguments"), commands_of("kd.serve"))
def test_commands_of_servers_compose_and_validate(page, arguments, monkeypatch):
    monkeypatch.setenv("KD_SERVE_TOKEN", "as the page says")
    register()
    register_server()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        typed_object(compose("serve", overrides=arguments)).validate()


def test_pages_have_commands():
    pages = {parameters.values[0] for parameters in commands_of("kd.run")}
    assert {"README.md", "recipe.md", "parallel.md"} <= pages


def test_scripts_named_in_commands_exist():
    named = {word for page in PAGES for words in commands(page) for word in words}
    scripts = {word for word in named if word.startswith("scripts/")}
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= scripts
    assert not [word for word in scripts if not (REPO / word).is_file()]


def anchors(text: str) -> set[str]:
    """What a heading is linked by."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = REPO if (REPO / page).exists() else REPO / "docs"
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name) if name else folder / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_files_named_in_backticks_exist(page):
    named = re.findall(r"`((?:kd|recipes|configs|scripts|tests|docs)/[\w./]*\w/?)`", PAGES[page])
    assert not [name for name in named if not (REPO / name).exists()]


def config_keys(schema: type, prefix: str) -> set[str]:
    """Dotted keys of a dataclass and of those below it."""
    keys = {prefix}
    for name, hint in typing.get_type_hints(schema).items():
        key = f"{prefix}.{name}".lstrip(".")
        keys |= config_keys(hint, key) if dataclasses.is_dataclass(hint) else {key}
    return keys


KEYS = config_keys(VlmKDConfig, "").union(
    *(
        config_keys(schema, group.replace("/", "."))
        for group, schemas in (OPTIONS | DFLASH_OPTIONS).items()
        for schema in schemas.values()
    ),
    config_keys(DFlashConfig, ""),
    config_keys(ServerConfig, ""),
)
GROUPS = {key.split(".")[0] for key in KEYS if "." in key}


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_in_backticks_exist(page):
    named = set(re.findall(r"`([a-z_]+\.[a-z_.]+[a-z])(?:=[^`]*)?`", PAGES[page]))
    named = {name for name in named if name.split(".")[0] in GROUPS}
    open_ended = ("student.architecture.", "teacher.architecture.")
    assert not {name for name in named - KEYS if not name.startswith(open_ended)}
