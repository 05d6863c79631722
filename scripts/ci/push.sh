#!/usr/bin/env bash
# nf4 push: one commit at the end, so that nobody sees half a model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

words=(nf4 push --json)
[ "$NF4_PUBLIC" != true ] || words+=(--public)
words+=(-- "$NF4_OUTPUT" "$NF4_PUSH_TO")
[ -n "${HF_TOKEN:-}" ] || unset HF_TOKEN

code=0
untrusted "$NF4_REPORTS/push.json" "${words[@]}" || code=$?
python "$GITHUB_ACTION_PATH/scripts/ci/report.py" "$NF4_REPORTS/push.json" >>"$GITHUB_OUTPUT"
exit "$code"
