#!/usr/bin/env bash
# Names and keys that the other steps use; refuses inputs that contradict each other.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case $NF4_VERIFY in
  alone | source | none) ;;
  *) fail "verify is '$NF4_VERIFY': write alone, source or none" ;;
esac
case $NF4_MINUTES in
  "") ;;
  *[!0-9]*) fail "minutes is '$NF4_MINUTES': write a whole number" ;;
  *) command -v timeout >/dev/null || fail "minutes needs GNU timeout, which macOS lacks: brew install coreutils, or leave it out" ;;
esac
[ -n "$NF4_MODEL" ] || fail "model is empty: name a directory, or org/name on the Hub"

# Where nf4 quantize would put it, said here because the cache has to know.
if [ -e "$NF4_MODEL" ]; then
  name=$(python -c 'import os, sys; print(os.path.basename(os.path.abspath(sys.argv[1])))' "$NF4_MODEL")
else
  name=$(basename -- "${NF4_MODEL%%@*}")
fi
result=$NF4_OUTPUT
if [ -z "$result" ] && [ -z "$NF4_PUSH_TO" ]; then
  result="${name%.safetensors}-nf4"
fi
workspace=$result
[ -n "$workspace" ] || workspace="models--${NF4_PUSH_TO//\//--}"

# One directory for each use of the action in a job.
mkdir -p "$RUNNER_TEMP"
reports=$(mktemp -d "$RUNNER_TEMP/nf4-reports-XXXXXX")

output output "$result"
output workspace "$(dirname -- "$workspace")/.$(basename -- "$workspace").partial"
output reports "$reports"
output hub-cache "${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}"
output model-key "$(printf '%s' "$NF4_MODEL" | sum)"
output run-key "$(printf '%s\n' "$NF4_MODEL" "$NF4_OUTPUT" "$NF4_PUSH_TO" "$NF4_ARGS" | sum)"
output pip-cache "$(python -m pip cache dir)"
output pip-key "$(sum <"$GITHUB_ACTION_PATH/pyproject.toml")"
free_disk
