"""Sizes and durations as people read them."""

from __future__ import annotations


def in_decimal_unit(nbytes: float) -> tuple[float, str]:
    """Return bytes as (number, unit), in the largest of B, kB, MB, GB and TB that is not above."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return nbytes, unit
        nbytes /= 1000
    return nbytes, "TB"


def format_size(nbytes: float) -> str:
    """Return bytes in decimal units, as the Hub and disks count: `12 B`, `1.5 GB`, `2.05 TB`."""
    number, unit = in_decimal_unit(nbytes)
    decimals = {"B": 0, "TB": 2}.get(unit, 1)
    return f"{number:,.{decimals}f} {unit}"


def size_for_option(nbytes: int) -> str:
    """Return bytes as the options take them, rounded up to whole megabytes: `1589MB`."""
    return f"{-(-nbytes // 1_000_000)}MB"


def format_duration(seconds: float) -> str:
    """Return seconds as `0.4 s`, `8 s`, `3:12 min` or `2:10 h`."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60}:{whole % 60:02} min"
    minutes = whole // 60
    return f"{minutes // 60:,}:{minutes % 60:02} h"


def plural(count: int, noun: str) -> str:
    """Return `1 file` or `3 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
