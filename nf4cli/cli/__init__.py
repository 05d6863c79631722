"""The command line: one thin module a command, this file only registers them.

Nothing heavy is imported before a command runs, so that `nf4 --help` is quick.
"""

from __future__ import annotations

import errno
import io
import signal
import sys

import typer

from .. import __version__
from . import common
from .dequantize import dequantize
from .inspect import inspect
from .quantize import quantize
from .verify import verify

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

app = typer.Typer(
    name="nf4",
    help="Stream full-precision checkpoints into bitsandbytes NF4, and prove what was written.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a check failed, 2 usage, 3 bad or unsupported input, "
    "4 the machine (disk full, I/O error, no engine), 130 interrupted.",
)
for command in (quantize, verify, dequantize, inspect):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        print(f"nf4 {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None: ...


def main() -> None:
    """The entry point: the one place where an error becomes a message and an exit code."""
    from ..errors import Nf4Error

    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    _allow_open_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name must not end us in a poorer locale
    try:
        app()
    except Nf4Error as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("the machine has not enough memory: free some, or use fewer --workers", 4)
    except OSError as error:
        if common.result_began():
            _fail(
                f"the work is done, but its result cannot be printed: {error.strerror or error}. "
                "Nothing that was written is damaged; -q prints nothing",
                4,
            )
        advice = ": free some space and start again" if error.errno == errno.ENOSPC else ""
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}{advice}; nothing was left behind", 4)


def _allow_open_files() -> None:
    """A conversion holds every shard open; the usual limit is far below what the system allows."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(16_384, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _interrupt(number: int, _: object) -> None:
    """Ctrl-C or a polite kill, as an error like any other; a second one waits for the cleaning."""
    from ..errors import InterruptedRunError

    for handled in _SIGNALS:
        signal.signal(handled, signal.SIG_IGN)
    raise InterruptedRunError("interrupted; nothing was left behind")


def _fail(message: str, code: int) -> None:
    from rich.console import Console

    from ..untrusted import printable

    console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
    console.print("[bold red]error:[/]", end=" ")
    console.print(printable(message), markup=False)
    sys.exit(code)
