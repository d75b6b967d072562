#!/usr/bin/env bash
# What can be known of kd on a GPU only, in at most 8 minutes, on a machine with one GPU and no network.
# The report goes to OUT (runs/gpu_check): report.txt, report.json, log.txt. See docs/gpu.md.
# Usage: scripts/gpu_check.sh [OUT] [--rows NAME] [--seconds S]
# Nothing is built and nothing of the machine is changed: what its Python lacks comes from .gpu_wheels/
# (scripts/gpu_wheels.sh) into a folder that is removed at the end.
set -euo pipefail
out=$(realpath -m "${1:-runs/gpu_check}")
shift $(($# < 1 ? $# : 1))
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${KD_PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=${KD_PYTHON:-python3}
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

mkdir -p "$out"
if [ -d .gpu_wheels ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # Not a venv: on top of a Python that is a venv itself it would not see what that one has.
  "$python" scripts/gpu_report.py --unpack .gpu_wheels "$site"
  export PYTHONPATH="$PWD:$site"
fi
"$python" scripts/gpu_report.py "$out" "$@" 2>"$out/log.txt"
