#!/usr/bin/env bash
# nf4 in an environment of its own, on the PATH of the steps that follow.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

place="$RUNNER_TEMP/nf4-venv"
[ -x "$place/bin/python" ] || python -m venv "$place"
"$place/bin/python" -m pip install --quiet --disable-pip-version-check \
  "${NF4_INSTALL:-$GITHUB_ACTION_PATH}"
printf '%s\n' "$place/bin" >>"$GITHUB_PATH"
"$place/bin/nf4" --version
