"""The projects that benchmarks compare with: one folder serves all (`--install-peers DIR`)."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

PEERS = {"liger-kernel": "0.8.5", "nemo-automodel": "0.7.0", "trl": "1.16.0"}


def missing(site: Path) -> list[str]:
    """What is not in this site-packages folder in the version wanted, as pip is told."""
    have = {found.name.lower().replace("_", "-"): found.version for found in _in(site)}
    return [f"{name}=={version}" for name, version in PEERS.items() if have.get(name) != version]


def _in(site: Path) -> list:
    return list(distributions(path=[str(site)]))


def install(folder: Path) -> Path:
    """The python of a venv with the peers alone; torch and the rest come from this interpreter.

    A folder that has some of them already gets the others. Needs a package index, or their wheels
    in PIP_FIND_LINKS with PIP_NO_INDEX=1.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # Not --system-site-packages: where this interpreter is a venv's, those are not its packages.
    (site / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    if wanted := missing(site):
        pip = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *wanted], check=True)
    return python
