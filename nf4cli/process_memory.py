"""How much memory this process takes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident_bytes() -> int | None:
    """Return the bytes of this process that are in memory now.

    Where the system tells only the peak, return that; None where it tells nothing.
    """
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - asked ten times a second
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return peak_bytes()


def peak_bytes() -> int | None:
    """Return the most bytes that this process had in memory; None where the system is silent."""
    try:
        # ru_maxrss would begin with the memory of the process that started this one.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
        if peak:
            return int(peak[1]) * 1024
    except (OSError, UnicodeDecodeError):
        pass
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024
