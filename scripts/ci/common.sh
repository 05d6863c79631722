# shellcheck shell=bash
# Sourced by the steps of action.yml, which run on a GitHub runner (Linux, macOS).
# Environment: what GitHub sets (GITHUB_OUTPUT, RUNNER_TEMP), NF4_* from the action's inputs.
set -euo pipefail

fail() {
  # A line break, also one written %0A, would begin a new command to the runner.
  printf '::error title=nf4::%s\n' "$(printf '%s' "$*" | tr '\r\n%' '   ')"
  exit 2
}

output() {
  case $2 in
    *$'\n'*) fail "the output $1 would hold a line break" ;;
  esac
  printf '%s=%s\n' "$1" "$2" >>"$GITHUB_OUTPUT"
}

sum() {
  python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])'
}

# untrusted FILE COMMAND...: stdout goes to FILE. What a command says may quote names from a model
# that anybody made: no line of it is an order to the runner. The exit code is the command's.
untrusted() {
  local token code=0 file=$1
  shift
  token=$(python -c 'import secrets; print(secrets.token_hex(16))')
  printf '::stop-commands::%s\n' "$token"
  "$@" >"$file" || code=$?
  printf '::%s::\n' "$token"
  return "$code"
}

free_disk() {
  df -Pk . | awk 'NR == 2 { printf "%.1f GB of disk free\n", $4 * 1024 / 1e9 }'
}
