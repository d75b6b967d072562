"""The wheel holds all that a run needs, and works from any directory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.processes import Process, completed, environment, python


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    done = completed(*build, Path(__file__).parents[1])
    assert done.returncode == 0, done.tail()
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *args: str) -> Process:
    command = python("-m", "kd.run", *args)
    return completed(*command, cwd=cwd, env=environment(PYTHONPATH=str(installed)))


def test_ships_configs_recipes_and_licence(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*")}
    assert {"kd/configs/qwen_vl_kd.yaml", "kd/configs/data/medpix.yaml"} <= names
    assert {"recipes/vlm_kd.py", "kd/logger/report.html.jinja"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "scripts", "docs")) for name in names)


def test_runs_from_any_directory_with_the_users_own_configs(installed, tmp_path):
    own = tmp_path / "my_configs"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "short.yaml").write_text(
        "# @package _global_\nrun:\n  name: mine\ntrain:\n  max_steps: 77\n"
    )
    # Folders of the user's that bear the names of ours.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "qwen_vl_kd.yaml").write_text("not: ours\n")
    done = run(
        installed,
        tmp_path,
        "--config-name=qwen_vl_kd",
        f"--config-dir={own}",
        "experiment=short",
        "dry_run=true",
    )
    assert done.returncode == 0, done.stderr
    assert "mine: plan for 1 rank" in done.stdout
    assert "77" in done.stdout
    assert not (tmp_path / "runs").exists()
