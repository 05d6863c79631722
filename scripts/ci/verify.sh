#!/usr/bin/env bash
# nf4 verify; its findings become an annotation, and all of them are in its two reports.
# What was pushed and left nothing here is proved where it is, within the same bound on the disk.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

words=(nf4 verify --json --junit "$NF4_REPORTS/junit.xml")
if [ -n "$NF4_SOURCE" ]; then
  # A branch may have moved on: without a revision it is the commit that the manifest names.
  [ -e "$NF4_SOURCE" ] || NF4_SOURCE=${NF4_SOURCE%%@*}
  words+=("--source=$NF4_SOURCE")
  if [ -n "$NF4_DISK" ] && { [ ! -e "$NF4_SOURCE" ] || [ "$NF4_OUTPUT" = "$NF4_PUSH_TO" ]; }; then
    words+=(--disk "$NF4_DISK")
  fi
fi
[ -z "$NF4_MEMORY" ] || words+=(--memory "$NF4_MEMORY")
words+=(-- "$NF4_OUTPUT")
[ -n "${HF_TOKEN:-}" ] || unset HF_TOKEN

code=0
untrusted "$NF4_REPORTS/verify.json" "${words[@]}" || code=$?
python "$GITHUB_ACTION_PATH/scripts/ci/report.py" "$NF4_REPORTS/verify.json" >>"$GITHUB_OUTPUT"
exit "$code"
