#!/usr/bin/env bash
# nf4 in a container (docker: without --userns keep-id). The model is in this directory or on the Hub.
# The output appears in this directory and belongs to the user who runs this.
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
