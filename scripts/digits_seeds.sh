#!/usr/bin/env bash
# The quickstart's comparison over several seeds: scripts/digits_seeds.sh [seed …] (default 0 1 2).
# A seed decides the weights, the order of rows, the phrasings and which labels are wrong.
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
[ $# -gt 0 ] || set -- 0 1 2

lists=("" "" "")
for seed in "$@"; do
  dir=runs/seed_$seed
  common=(run.dir="$dir" run.seed="$seed" student.seed="$seed" data.seed="$seed")
  "$python" -m kd.run --config-name digits_teacher "${common[@]}"
  "$python" -m kd.run --config-name digits_kd "${common[@]}"
  "$python" -m kd.run --config-name digits_kd experiment=digits_ce "${common[@]}"
  names=(digits_teacher digits_kd digits_ce)
  for i in 0 1 2; do lists[i]="${lists[i]:+${lists[i]},}$dir/${names[i]}"; done
done
"$python" scripts/digits_table.py --markdown \
  teacher="${lists[0]}" "student, distilled=${lists[1]}" "student, CE alone=${lists[2]}"
