"""A Hub to play with: `python -m hub_server ROOT [PORT [RATE]]` in tests/; ROOT/org/name are its
models, RATE the bytes a second of a connection."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from . import Hub


def main() -> None:
    root, port = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as place, Hub(Path(place) / "hub", port) as hub:
        hub.rate = float(sys.argv[3]) if len(sys.argv) > 3 else None
        for model in sorted(p for p in root.glob("*/*") if p.is_dir()):
            hub.add(model.relative_to(root).as_posix(), model)
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_write", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
