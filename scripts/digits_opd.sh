#!/usr/bin/env bash
# On-policy against off-policy distillation of the student that cross-entropy alone has trained, at
# equal steps and at equal wall time: scripts/digits_opd.sh [seed …] (default 0 1 2).
# Makes what it needs of scripts/digits_seeds.sh first. Let nothing else run: it measures time.
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
[ $# -gt 0 ] || set -- 0 1 2

# Steps of $2 that take as long as all steps of $1 did.
equal_time() {
  "$python" - "$1" "$2" <<'PY'
import json, statistics, sys

def step_s(run):
    rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    times = {row["step"]: row["train/step_s"] for row in rows if "train/step_s" in row}
    return max(times), statistics.median(times.values())

(steps, ours), (_, theirs) = map(step_s, sys.argv[1:])
print(round(steps * ours / theirs))
PY
}

names=(digits_ce on_policy off_policy off_policy_equal_time)
lists=("" "" "" "")
for seed in "$@"; do
  dir=runs/seed_$seed
  common=(run.dir="$dir" run.seed="$seed" data.seed="$seed")
  "$python" -m kd.run --config-name digits_teacher "${common[@]}" student.seed="$seed"
  "$python" -m kd.run --config-name digits_kd experiment=digits_ce "${common[@]}" student.seed="$seed"
  off=(--config-name digits_kd student=pretrained student.name="$dir/digits_ce/export")
  off+=("${common[@]}")
  "$python" -m kd.run --config-name digits_opd "${common[@]}" run.name=on_policy
  "$python" -m kd.run "${off[@]}" run.name=off_policy
  steps=$(equal_time "$dir/on_policy" "$dir/off_policy")
  "$python" -m kd.run "${off[@]}" run.name=off_policy_equal_time train.max_steps="$steps"
  for i in "${!names[@]}"; do lists[i]="${lists[i]:+${lists[i]},}$dir/${names[i]}"; done
done
"$python" scripts/digits_table.py --markdown \
  "start: CE alone=${lists[0]}" "on-policy=${lists[1]}" "off-policy, equal steps=${lists[2]}" \
  "off-policy, equal time=${lists[3]}"
