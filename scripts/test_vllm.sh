#!/usr/bin/env bash
# Test the vllm engine against a real vLLM server, which runs on a CPU too: sets up both
# environments and starts the server itself. Usage: scripts/test_vllm.sh [pytest options]
set -euo pipefail
export KD_PARENT_PID=$$ # what it starts ends when it does
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh test)
bash scripts/vllm_server.sh --setup
"$python" -m pytest -m vllm tests/vllm "$@"
