#!/usr/bin/env bash
# nf4 verify; its findings become an annotation, and all of them are in its two reports.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

words=(nf4 verify --json --junit "$NF4_REPORTS/junit.xml")
[ -z "$NF4_SOURCE" ] || words+=("--source=$NF4_SOURCE")
[ -z "$NF4_MEMORY" ] || words+=(--memory "$NF4_MEMORY")
words+=(-- "$NF4_OUTPUT")
[ -n "${HF_TOKEN:-}" ] || unset HF_TOKEN

code=0
untrusted "$NF4_REPORTS/verify.json" "${words[@]}" || code=$?
python "$GITHUB_ACTION_PATH/scripts/ci/report.py" "$NF4_REPORTS/verify.json" >>"$GITHUB_OUTPUT"
exit "$code"
