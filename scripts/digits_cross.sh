#!/usr/bin/env bash
# The digits across two tokenizers over several seeds: scripts/digits_cross.sh [seed …] (default
# 0 1 2). A seed decides the weights, the order of rows, the phrasings and which labels are wrong.
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
[ $# -gt 0 ] || set -- 0 1 2

names=(digits_cross digits_cross_jsd digits_cross_uld digits_cross_ce)
lists=("" "" "" "")
for seed in "$@"; do
  dir=runs/seed_$seed
  common=(run.dir="$dir" run.seed="$seed" student.seed="$seed" data.seed="$seed")
  "$python" -m kd.run --config-name digits_teacher "${common[@]}"
  cross=(--config-name digits_kd experiment=digits_cross "${common[@]}")
  "$python" -m kd.run "${cross[@]}" loss.divergence=forward_kl
  "$python" -m kd.run "${cross[@]}" run.name=digits_cross_jsd
  "$python" -m kd.run "${cross[@]}" run.name=digits_cross_uld loss=uld
  "$python" -m kd.run "${cross[@]}" run.name=digits_cross_ce kd_ratio=0
  for i in "${!names[@]}"; do lists[i]="${lists[i]:+${lists[i]},}$dir/${names[i]}"; done
done
"$python" scripts/digits_table.py --markdown \
  "gold, forward KL=${lists[0]}" "gold, JSD=${lists[1]}" "uld=${lists[2]}" "CE alone=${lists[3]}"
