#!/usr/bin/env bash
# Sets up .venv with the test tools and runs every check. Usage: scripts/test.sh [pytest options]
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh test)
bin=$(dirname "$python")

# Tests start many processes; without bytecode each would compile torch and transformers anew.
unset PYTHONDONTWRITEBYTECODE

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-cache
"$bin/basedpyright"
"$python" -m pytest -n 2 "$@" # two workers: most tests keep one core busy
