#!/usr/bin/env bash
# Make .venv (or $KD_VENV) with kd installed in place, by the Python on the PATH (or $KD_PYTHON).
# Usage: scripts/setup.sh [extra,...]
# With KD_LOWEST=1: the oldest packages that pyproject.toml allows, not those of constraints.txt.
# Prints the venv's python on stdout; everything else goes to stderr. What is installed already is
# left alone, without a package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${KD_VENV:-$PWD/.venv}"
extras="${1:-}"
fail() { echo "error: $*" >&2; exit 2; }

# One line per set of extras, of what they were installed from; with any, there is all but extras.
stamp="$venv/.kd-installed"
versions=(--constraint constraints.txt)
[ -z "${KD_LOWEST:-}" ] || versions=(--resolution lowest-direct)
from="$PWD $(echo "${versions[@]}" | cat - pyproject.toml constraints.txt | cksum)"
is_installed() {
  grep -qxF "$from $extras" "$stamp" 2>/dev/null ||
    { [ -z "$extras" ] && grep -qF "$from" "$stamp" 2>/dev/null; }
}
if is_installed && "$venv/bin/python" -c '' 2>/dev/null; then
  echo "$venv/bin/python"
  exit
fi

python=""
for candidate in ${KD_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
  if command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "kd needs Python 3.11 or newer on the PATH"

# uv from the PATH if there is one, else a private copy beside the environment.
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  uv="$venv-uv/bin/uv"
  if [ ! -x "$uv" ]; then
    "$python" -m venv "$venv-uv" >&2 ||
      fail "$python cannot make a virtual environment in $venv-uv: install its venv module (Debian: python3-venv), or see what is said above"
    "$venv-uv/bin/python" -m pip install --quiet --no-cache-dir "uv>=0.8" >&2 ||
      fail "cannot install uv: the set-up needs a package index, once"
  fi
fi
# Where the home is read-only, uv keeps what it downloads beside the environment.
cache=$("$uv" cache dir)
{ mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ]; } || export UV_CACHE_DIR="$venv-uv/cache"

[ -x "$venv/bin/python" ] || "$uv" venv --quiet --python "$python" "$venv" >&2
"$uv" pip install --quiet --python "$venv/bin/python" \
  "${versions[@]}" --editable ".${extras:+[$extras]}" >&2 ||
  fail "cannot install kd's packages: the set-up needs a package index and some 8 GB of disk, once"
{ grep -F "$from" "$stamp" 2>/dev/null || true; echo "$from $extras"; } >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "$venv/bin/python"
