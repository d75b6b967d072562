#!/usr/bin/env bash
# The whole test suite with the oldest packages that pyproject.toml allows, as far as it names them,
# in an environment of its own (.venv-lowest). Usage: scripts/test_lowest.sh [pytest options]
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(KD_LOWEST=1 KD_VENV="$PWD/.venv-lowest" KD_PYTHON="${KD_PYTHON:-python3.12}" bash scripts/setup.sh test)
unset PYTHONDONTWRITEBYTECODE
"$python" -m pytest -n 2 "$@"
