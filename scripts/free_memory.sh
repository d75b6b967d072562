#!/usr/bin/env bash
# MiB of memory that are free for this process: of the machine, and of its control groups (Linux).
# Prints a large number where nothing tells.
set -euo pipefail
free=1000000
[ ! -r /proc/meminfo ] || free=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)

# The limit of a group less what it uses, where the kernel's file cache does not count as used.
at_most() { # LIMIT_FILE USAGE_FILE CACHE_KEY
  local limit usage cache left
  { [ -r "$1" ] && [ -r "$2" ]; } || return 0
  limit=$(cat "$1")
  [[ "$limit" =~ ^[0-9]{1,15}$ ]] || return 0 # "max", or 2^63
  usage=$(cat "$2")
  cache=$(awk -v key="$3" '$1 == key { print $2 }' "$(dirname "$2")/memory.stat" 2>/dev/null || true)
  left=$(((limit - usage + ${cache:-0}) / 1048576))
  [ "$left" -ge "$free" ] || free=$left
}
# Of the group itself and those above it. Inside a container its own group looks like the root.
while IFS=: read -r _ controllers path; do
  case ",$controllers," in
    ,,) root=/sys/fs/cgroup names="memory.max memory.current inactive_file" ;;
    *,memory,*) root=/sys/fs/cgroup/memory names="memory.limit_in_bytes memory.usage_in_bytes total_inactive_file" ;;
    *) continue ;;
  esac
  read -r limit usage key <<<"$names"
  while :; do
    at_most "$root$path/$limit" "$root$path/$usage" "$key"
    case "$path" in "" | /) break ;; esac
    path=${path%/*}
  done
done </proc/self/cgroup 2>/dev/null || true
echo "$free"
