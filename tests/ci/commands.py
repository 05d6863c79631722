"""Commands put in the place of real ones, found first on the PATH."""

from __future__ import annotations

import atexit
import os
import shlex
import sys
import tempfile
from functools import cache
from pathlib import Path

from forking import nf4_command

BIN = Path(sys.executable).parent


@cache
def _nf4() -> Path:
    """Write the command nf4 that runs in a Python with its imports made; return the file."""
    place = tempfile.TemporaryDirectory(prefix="nf4-tests-")
    atexit.register(place.cleanup)
    command = Path(place.name) / "nf4"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(nf4_command())} "$@"\n')
    command.chmod(0o755)
    return command


def path_with_nf4() -> str:
    """Return a PATH on which nf4 is the tests' own."""
    return f"{_nf4().parent}:{BIN}:{os.environ['PATH']}"


def stand_in(place: Path, name: str, script: str) -> str:
    """Write a bash script as a command; returns a PATH that has it.

    In the script $REAL is nf4 itself, and $TROUBLED one with a fault (see troubled_nf4.py).
    """
    place.mkdir(exist_ok=True)
    command = place / name
    troubled = Path(__file__).with_name("troubled_nf4.py")
    command.write_text(
        f'#!/bin/bash\nREAL="{_nf4()}"\nTROUBLED=("{sys.executable}" -I "{troubled}")\n{script}\n'
    )
    command.chmod(0o755)
    return f"{place}:{path_with_nf4()}"
