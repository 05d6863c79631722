"""Show with --plan what a model on the Hub takes: bytes to fetch, times, the smallest --disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...units import format_duration, format_size, size_for_option
from . import terminal

if TYPE_CHECKING:
    from ...api.quantizing import Job

_LINKS = (("100 Mbit/s", 12.5e6), ("1 Gbit/s", 125e6), ("10 Gbit/s", 1.25e9))  # bytes a second


def outlook_document(job: Job) -> dict[str, Any]:
    """Return the facts about a model on a Hub as a document; {} for a model on this disk."""
    amounts = job.outlook()
    if amounts is None:
        return {}
    outlook, speed = amounts
    return {
        **asdict(outlook),
        "convert_bytes_per_second": round(speed),
        "convert_seconds": round(job.model.source_bytes / speed, 1),
    }


def show_outlook(outlook: dict[str, Any]) -> None:
    """Print the facts of `outlook_document` in words."""
    console = terminal.out_console()
    fetch, cached = outlook["fetch_bytes"], outlook["cached_bytes"]
    in_cache = f", {format_size(cached)} are in the cache" if cached else ""
    model = f"{terminal.plain(outlook['repo'])}@{outlook['commit']}"
    console.print(f"fetch   {fetch:,} bytes of {model}{in_cache}")
    seconds = format_duration(outlook["convert_seconds"])
    speed = format_size(outlook["convert_bytes_per_second"])
    links = ", ".join(f"{format_duration(fetch / rate)} at {name}" for name, rate in _LINKS)
    console.print(
        f"time    {seconds} to convert (measured here: {speed}/s)"
        + (f"; to fetch {links}" if fetch else "")
    )
    smallest = size_for_option(outlook["smallest_disk_bytes"])
    pushed = size_for_option(outlook["smallest_disk_bytes_when_pushed"])
    console.print(
        f"bound   --disk {smallest} or more; with --push-to and no OUTPUT {pushed} or more"
    )
