#!/usr/bin/env bash
# Fetches into .gpu_wheels/ what a machine with PyTorch, transformers and pytest, but without a package
# index, lacks for scripts/gpu_check.sh (53 MB). To be run where there is an index; for Python 3.12.
# Usage: scripts/gpu_wheels.sh [kd] [arrow] [kernels] [peers]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=.gpu_wheels
declare -A groups=(
  # What kd imports.
  [kd]="hydra-core==1.3.8 omegaconf==2.3.1 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 torchdata==0.11.0"
  # 49 MB of it: leave it out where the machine has 24 or newer.
  [arrow]="pyarrow==24.0.0"
  # Qwen3.5's linear attention.
  [kernels]="flash-linear-attention==0.6.0 fla-core==0.6.0"
  # What the objective is measured beside.
  [peers]="liger-kernel==0.8.5 trl==1.16.0"
)
pip="${KD_PYTHON:-python3} -m pip"
[ $# -gt 0 ] || rm -rf "$folder" # two versions of a package could not be installed
mkdir -p "$folder"
for group in "${@:-kd arrow kernels peers}"; do
  for name in $group; do
    [ -n "${groups[$name]:-}" ] || { echo "error: $name: use kd, arrow, kernels or peers" >&2; exit 2; }
    # Without dependencies: PyTorch's own are on the machine. Wheels for glibc 2.28 run on newer ones.
    $pip download --quiet --dest "$folder" --no-deps --only-binary=:all: --implementation cp \
      --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
      ${groups[$name]}
    # There is no wheel of it.
    [ "$name" != kd ] || $pip wheel --quiet --wheel-dir "$folder" --no-deps antlr4-python3-runtime==4.9.3
  done
done
du -h "$folder"/*.whl
