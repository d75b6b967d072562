#!/usr/bin/env bash
# From nothing to a distilled student: sets up .venv, trains a small teacher on handwritten digits,
# distils it, and prints how the student compares. Run it again and it resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
needed_mib=1500 # measured; see docs/digits.md
free_mib=$(bash scripts/free_memory.sh)
if [ "$free_mib" -lt "$needed_mib" ]; then
  echo "error: the quickstart needs $needed_mib MiB of memory, and $free_mib MiB are free here: close other programs, or raise the container's limit" >&2
  exit 2
fi
python=$(bash scripts/setup.sh)
export KD_PARENT_PID=$$ # a run ends when this script does, however it ends

step() { printf '\n== %s\n' "$1"; }
run() {
  local code=0
  "$python" -m kd.run "$@" || code=$?
  [ "$code" != 137 ] || echo "error: the run was killed, most likely for lack of memory; the same command goes on from its last checkpoint" >&2
  [ "$code" = 0 ] || exit "$code"
}
step "1/3 teacher: cross-entropy on its own images"
run --config-name digits_teacher
step "2/3 student: distilled, on other images whose labels are wrong three times in ten"
run --config-name digits_kd
step "3/3 the same student by cross-entropy alone"
run --config-name digits_kd experiment=digits_ce
step "exact answers on held-out images"
"$python" scripts/digits_table.py runs/digits_teacher runs/digits_kd runs/digits_ce
echo "Look at runs/digits_kd/report.html"
