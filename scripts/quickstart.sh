#!/usr/bin/env bash
# From nothing to a distilled student: sets up .venv, trains a small teacher on handwritten digits,
# distils it, and prints how the student compares. Run it again and it resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)

step() { printf '\n== %s\n' "$1"; }
step "1/3 teacher: cross-entropy on its own images"
"$python" -m kd.run --config-name digits_teacher
step "2/3 student: distilled, on other images whose labels are wrong three times in ten"
"$python" -m kd.run --config-name digits_kd
step "3/3 the same student by cross-entropy alone"
"$python" -m kd.run --config-name digits_kd experiment=digits_ce
step "exact answers on held-out images"
"$python" scripts/digits_table.py runs/digits_teacher runs/digits_kd runs/digits_ce
echo "Look at runs/digits_kd/report.html"
