"""Print text for people on consoles, and JSON documents for programs."""

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


def note(sentence: str) -> None:
    """Print on stderr what a user should know and is no error."""
    err_console().print(f"[yellow]note:[/] {plain(sentence)}")


class _Results:
    """The state of the results on stdout.

    Attributes:
        begun: a result was printed; if a stream fails from then on, it is stdout.
    """

    begun = False


results = _Results()


def out_console() -> Console:
    """Return a console on stdout, for results."""
    _begin_results()
    return _console(stderr=False)


def _begin_results() -> None:
    """Take note that the work is done, and that nobody has to read on."""
    results.begun = True
    end_at_closed_pipe()


def end_at_closed_pipe() -> None:
    """Let a closed pipe end the process, as in `nf4 ... | head`."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@cache
def err_console() -> Console:
    """Return the console on stderr, for progress and messages; one, so that none tears a bar."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    class Messages(Console):
        def on_broken_pipe(self) -> None:
            """Print nothing more where nobody reads; rich would end the process."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    # On a terminal, lines are broken at words; in a pipe or log they stay whole.
    stream = sys.stderr if stderr else sys.stdout
    logged = stream is None or not stream.isatty()  # None: the caller closed it
    return (Messages if stderr else Console)(
        stderr=stderr, highlight=False, emoji=False,
        soft_wrap=logged, width=200 if logged else None,
    )  # fmt: skip


def plain(text: object) -> str:
    """Return a name or path for a styled line, with its brackets and control characters escaped."""
    from rich.markup import escape

    return escape(printable(str(text)))


JSON_VERSION = 1
"""Version of every document of --json; docs/machine.md says what it promises."""


def print_json(kind: str, document: dict[str, Any]) -> None:
    """Print the one document of --json on stdout, in ASCII whatever the locale.

    Args:
        kind: stem of the document's schema in docs/schemas.

    Raises:
        ValueError: the document holds a NaN or an infinity, which JSON does not know: a bug.
    """
    _begin_results()
    whole = {"nf4": kind, "version": JSON_VERSION, **document}
    text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(re.sub(r"[^\x00-\x7f]", _escaped, text) + "\n")


def _escaped(match: re.Match[str]) -> str:
    """Return a character as JSON escapes it.

    A lone surrogate (a byte of a file's name that is not UTF-8) becomes U+FFFD: strict parsers
    refuse its escape.
    """
    character = match[0]
    return json.dumps("\ufffd" if "\ud800" <= character <= "\udfff" else character)[1:-1]
