"""One nf4 command in this process, then the most GPU memory that torch held, as JSON."""

from __future__ import annotations

import json
import sys

import torch

from nf4cli import cli

if __name__ == "__main__":
    if sys.argv[1] == "--emulate":  # LIBRARY: the dry run
        from part_check import emulate

        emulate(sys.argv[2])
        del sys.argv[1:3]
    sys.argv[0] = "nf4"
    try:
        cli.main()
    finally:
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        print(json.dumps({"gpu_memory": memory}), flush=True)
