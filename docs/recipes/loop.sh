#!/usr/bin/env bash
# Convert each model, try again where that can help, and print a table.
# Usage: loop.sh MODEL...; ends with the exit code of the last model that failed.
set -uo pipefail

failed=0
for model in "$@"; do
  output="$(basename "$model")-nf4"
  for _ in 1 2 3; do
    code=0
    nf4 quantize "$model" "$output" --resume --json >"$output.json" || code=$?
    case $code in
      4) sleep "${PAUSE:-60}" ;; # the machine: continue from there, a little later
      *) break ;;                # done, interrupted, or wrong: trying again would change nothing
    esac
  done
  if [ "$code" = 0 ]; then
    nf4 verify "$output" --json >"$output.verify.json" || code=$?
  fi
  [ "$code" = 0 ] || failed=$code
  printf '%s\t%s\t%s\n' "$code" "$output" "$(jq -r '
    if .nf4 == "error" then .error.message
    else "\(.output_bytes) bytes, \(.bits_per_weight) bits a weight" end' "$output.json")"
  [ "$code" != 130 ] || break # Ctrl-C is for the whole loop
done
exit "$failed"
