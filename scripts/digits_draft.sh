#!/usr/bin/env bash
# From nothing to a draft that makes a model decode faster: sets up .venv, trains a target on
# handwritten digits, trains its draft, and decodes with it. Run it again and it resumes.
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)

step() { printf '\n== %s\n' "$1"; }
step "1/3 target: the digits teacher, also trained on text and on longer answers"
"$python" -m kd.run --config-name digits_teacher experiment=digits_talker
step "2/3 draft: learns what the target says"
"$python" -m kd.run --config-name dflash
step "3/3 decoding with it"
"$python" scripts/bench_dflash.py --config-name dflash
echo "Look at runs/dflash/report.html"
