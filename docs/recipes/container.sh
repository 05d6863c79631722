#!/usr/bin/env bash
# nf4 in a container (docker: without --userns keep-id). The model lies in this directory or on the
# Hub; the output appears here and belongs to whoever runs this.
# Usage: container.sh CHECKOUT_OF_NF4 MODEL OUTPUT
set -euo pipefail

podman build --tag nf4 --file "$1/Containerfile" "$1"
mkdir -p "$HOME/.cache/huggingface"
run() {
  podman run --rm --user "$(id -u):$(id -g)" --userns keep-id \
    --volume "$PWD:/models" --volume "$HOME/.cache/huggingface:/cache" --env HF_TOKEN \
    nf4 "$@"
}
run quantize "$2" "$3" --resume
run verify "$3"
