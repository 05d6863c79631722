"""What this process takes of the machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def memory() -> int | None:
    """Bytes of this process in memory now; its peak where only that is known, or None."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - asked ten times a second
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return peak_memory()


def peak_memory() -> int | None:
    """The most bytes that this process had in memory; None where the system does not say."""
    try:
        # ru_maxrss would begin with the memory of the process that started us.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
        if found:
            return int(found[1]) * 1024
    except (OSError, UnicodeDecodeError):
        pass
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free_disk(place: Path) -> int | None:
    """Bytes free where `place` is or will be; None where the system does not say."""
    try:
        place = place.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free
    except OSError:
        return None
