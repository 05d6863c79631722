"""What --plan says of a model on the Hub: bytes to fetch, times, the smallest --disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import terminal

if TYPE_CHECKING:
    from ...api.quantizing import Job

_LINKS = (("100 Mbit/s", 12.5e6), ("1 Gbit/s", 125e6), ("10 Gbit/s", 1.25e9))  # bytes a second


def outlook_document(job: Job) -> dict[str, Any]:
    """Return what --plan says of a model on a Hub; {} for one that lies here."""
    found = job.outlook()
    if found is None:
        return {}
    outlook, speed = found
    return {
        **asdict(outlook),
        "convert_bytes_per_second": round(speed),
        "convert_seconds": round(job.model.source_bytes / speed, 1),
    }


def show_outlook(outlook: dict[str, Any]) -> None:
    """The same in words."""
    console, size = terminal.out_console(), terminal.format_size
    fetch = outlook["fetch_bytes"]
    cached = f", {size(outlook['cached_bytes'])} are in the cache" * bool(outlook["cached_bytes"])
    times = ", ".join(f"{_duration(fetch / speed)} at {name}" for name, speed in _LINKS)
    console.print(
        f"fetch   {fetch:,} bytes of {terminal.plain(outlook['repo'])}@{outlook['commit']}{cached}"
    )
    console.print(
        f"time    {_duration(outlook['convert_seconds'])} to convert (measured here: "
        f"{size(outlook['convert_bytes_per_second'])}/s)" + (f"; to fetch {times}" if fetch else "")
    )
    console.print(
        f"bound   --disk {_megabytes(outlook['smallest_disk_bytes'])} or more; with --push-to and "
        f"no OUTPUT {_megabytes(outlook['smallest_disk_bytes_when_pushed'])} or more"
    )


def _megabytes(count: int) -> str:
    return f"{-(-count // 1_000_000)}MB"


def _duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
