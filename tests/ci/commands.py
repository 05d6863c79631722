"""Commands put in the place of real ones, found first on the PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def stand_in(place: Path, name: str, script: str) -> str:
    """Write a bash script as a command; returns a PATH that has it.

    In the script $REAL is the real nf4, and $TROUBLED one with a fault (see troubled_nf4.py).
    """
    place.mkdir(exist_ok=True)
    command = place / name
    troubled = Path(__file__).with_name("troubled_nf4.py")
    command.write_text(
        f'#!/bin/bash\nREAL="{BIN / "nf4"}"\nTROUBLED=("{sys.executable}" -I "{troubled}")\n'
        f"{script}\n"
    )
    command.chmod(0o755)
    return f"{place}:{BIN}:{os.environ['PATH']}"
