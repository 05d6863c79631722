#!/usr/bin/env bash
# nf4 quantize, always with --resume: it starts where there is nothing to go on with.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

words=(nf4 quantize --resume --json)
[ -z "$NF4_DISK" ] || words+=(--disk "$NF4_DISK")
[ -z "$NF4_MEMORY" ] || words+=(--memory "$NF4_MEMORY")
if [ -n "$NF4_PUSH_TO" ]; then
  words+=(--push-to "$NF4_PUSH_TO")
  [ "$NF4_PUBLIC" != true ] || words+=(--public)
fi
read -r -d '' -a more <<<"$NF4_ARGS" || true
words+=(${more[@]+"${more[@]}"} -- "$NF4_MODEL") # a name may begin with a dash
[ -z "$NF4_OUTPUT" ] || words+=("$NF4_OUTPUT")
# SIGTERM: nf4 keeps what is finished and ends with 130.
if [ -n "$NF4_MINUTES" ]; then
  words=(timeout --preserve-status --signal=TERM --kill-after=2m "${NF4_MINUTES}m" "${words[@]}")
fi
[ -n "${HF_TOKEN:-}" ] || unset HF_TOKEN


convert() {
  code=0
  untrusted "$NF4_REPORTS/quantize.json" "${words[@]}" || code=$?
}
convert
# A cache may bring the unfinished work of last week, and the model or nf4 is another since then.
if [ "$code" = 2 ] && [ -n "$NF4_RESTORED" ] && [ -e "$NF4_WORKSPACE/journal" ]; then
  echo "What an earlier job left does not fit what is asked for: beginning again without it."
  rm -r "$NF4_WORKSPACE"
  convert
fi
[ "$code" != 143 ] || code=130 # the signal came before nf4 had begun
output exit-code "$code"
output downloaded "$([ -e "$NF4_MODEL" ] && echo false || echo true)"
python "$GITHUB_ACTION_PATH/scripts/ci/report.py" "$NF4_REPORTS/quantize.json" >>"$GITHUB_OUTPUT"
if [ "$code" = 0 ] && [ -n "$NF4_OUTPUT" ]; then
  output path "$NF4_OUTPUT"
fi
free_disk
case $code in
  4 | 130) echo "Worth a re-run: what is finished is kept, and the next run goes on from there." ;;
esac
exit "$code"
