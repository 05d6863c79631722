"""Exercises a library of kernels in a process of its own, under a sanitizer or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_RUNTIMES = {"": (), "asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}


def exercise_apart(
    library: Path, sanitizer: str, parts: tuple[str, ...], order: str | None = None
) -> str:
    """What went wrong, "" for nothing.

    Args:
        parts: of the names of the kernels to check.
        order: of threads, see runtime.h.
    """
    preload = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in _RUNTIMES[sanitizer]
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
        "TSAN_OPTIONS": "halt_on_error=1",
        **({"EMU_ORDER": order} if order else {}),
    }
    options = [word for part in parts for word in ("--kernel", part)]
    done = subprocess.run(
        [sys.executable, "-m", "emulator.exercise", library, "--quick", *options],
        cwd=Path(__file__).parent.parent, env=environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    telling = ("FAILED", "WARNING: ThreadS", "ERROR: AddressS", "runtime error", "emulated GPU")
    found = next((line for line in lines if any(word in line for word in telling)), lines[-1])
    return found.strip()[:200]
