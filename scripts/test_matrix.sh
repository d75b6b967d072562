#!/usr/bin/env bash
# The whole test suite on this machine as on others: restricted to fewer processor instructions, with
# one thread or two, on several Pythons. Each combination has a line in the summary at the end.
#   scripts/test_matrix.sh ["default avx2 native" ["1 2" ["python3.11 python3.13"]]] [pytest options]
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
capabilities=${1:-default avx2 native} threads=${2:-1 2} pythons=${3:-python3.11 python3.13}
shift $(($# < 3 ? $# : 3))
unset PYTHONDONTWRITEBYTECODE

restricted() { # CAPABILITY COMMAND…: what acts on ATen, oneDNN and MKL
  case "$1" in
    native) env "${@:2}" ;;
    avx2) env ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 "${@:2}" ;;
    default) env ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 "${@:2}" ;;
    *) echo "error: $1: use default, avx2 or native" >&2; exit 2 ;;
  esac
}

summary="" failed=0
for name in $pythons; do
  python=$(KD_VENV="$PWD/.venv-$name" KD_PYTHON="$name" bash scripts/setup.sh test)
  for count in $threads; do
    for capability in $capabilities; do
      log=".venv-$name/tests-$capability-$count.log"
      echo "== $name, $count thread(s), $capability: $log"
      code=0
      restricted "$capability" OMP_NUM_THREADS="$count" "$python" -m pytest -n 2 "$@" >"$log" 2>&1 || code=$?
      [ "$code" = 0 ] || failed=1
      summary+="$name, $count thread(s), $capability: $(tail -n 1 "$log")"$'\n'
    done
  done
done
printf '\n%s' "$summary"
exit "$failed"
