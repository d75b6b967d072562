#!/usr/bin/env bash
# Make .venv (or $KD_VENV) with kd installed in place. Usage: scripts/setup.sh [extra,...]
# Prints the venv's python on stdout; everything else goes to stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${KD_VENV:-$PWD/.venv}"
extras="${1:-}"

python=""
for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
  if command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || { echo "kd needs Python 3.11 or newer on the PATH" >&2; exit 2; }

# uv from the PATH if there is one, else a private copy beside the environment.
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  uv="$venv-uv/bin/uv"
  if [ ! -x "$uv" ]; then
    "$python" -m venv "$venv-uv" >&2 ||
      { echo "$python cannot make a virtual environment: install its venv module" >&2; exit 2; }
    "$venv-uv/bin/python" -m pip install --quiet "uv>=0.8" >&2
  fi
fi

[ -x "$venv/bin/python" ] || "$uv" venv --quiet --python "$python" "$venv" >&2
"$uv" pip install --quiet --python "$venv/bin/python" \
  --constraint constraints.txt --editable ".${extras:+[$extras]}" >&2
echo "$venv/bin/python"
