"""Text for people and programs: consoles, messages, sizes, JSON documents."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from ...checkpoint.untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console

    from ...callbacks import Notify


def format_size(count: float) -> str:
    """Bytes in decimal units, as the Hub and disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def notices(quiet: bool) -> Notify:
    """Who is told what a user should know."""
    from ... import callbacks

    return callbacks.no_notice if quiet else note


def note(sentence: str) -> None:
    """A message that is not an error, on stderr."""
    err_console().print(f"[yellow]note:[/] {plain(sentence)}")


class _Results:
    """Attributes: begun, whether a result was shown: what fails from then on is stdout."""

    begun = False


results = _Results()


def out_console() -> Console:
    """For results, on stdout."""
    _let_a_closed_pipe_end_us()
    return _console(stderr=False)


def _let_a_closed_pipe_end_us() -> None:
    """From the first result on the work is done, and `nf4 ... | head` may stop reading."""
    results.begun = True
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@cache
def err_console() -> Console:
    """For progress and messages, on stderr; one for all, so that no message tears a bar."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    class Messages(Console):
        def on_broken_pipe(self) -> None:
            """Nobody reads them any more: no reason to end the work, as rich would."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    # A terminal's lines are broken at words; a pipe or a log has no columns to break them at.
    stream = sys.stderr if stderr else sys.stdout
    logged = stream is None or not stream.isatty()  # None: the caller closed it
    return (Messages if stderr else Console)(
        stderr=stderr, highlight=False, emoji=False,
        soft_wrap=logged, width=200 if logged else None,
    )  # fmt: skip


def plain(text: object) -> str:
    """A name or path for a styled line: its brackets are not markup, its escapes do nothing."""
    from rich.markup import escape

    return escape(printable(str(text)))


def plural(count: int, noun: str) -> str:
    """`1 file`, `3 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


JSON_VERSION = 1
"""Of every document of --json; docs/machine.md says what a version promises."""


def print_json(kind: str, document: dict[str, Any]) -> None:
    """The only thing on stdout under --json; ASCII, whatever the locale.

    Args:
        kind: what the document is, the stem of its schema in docs/schemas.

    Raises:
        ValueError: it holds a NaN or an infinity, which JSON has no word for: a bug.
    """
    _let_a_closed_pipe_end_us()
    whole = {"nf4": kind, "version": JSON_VERSION, **document}
    text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(re.sub(r"[^\x00-\x7f]", _escaped, text) + "\n")


def _escaped(match: re.Match[str]) -> str:
    """One character as JSON escapes it.

    A lone surrogate (a byte of a file's name that is not UTF-8) becomes U+FFFD: strict parsers
    refuse its escape.
    """
    character = match[0]
    return json.dumps("\ufffd" if "\ud800" <= character <= "\udfff" else character)[1:-1]
