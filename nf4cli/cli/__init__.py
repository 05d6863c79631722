"""The command line: register the commands, and turn errors into messages and exit codes.

Each command has a thin module, imported when it is asked for. Nothing heavy is imported before a
command runs, so that `nf4 --help` is quick.
"""

from __future__ import annotations

import io
import os
import sys
from itertools import pairwise
from typing import Any

import typer

from .. import stopping
from ..version import __version__
from .commands import Commands
from .panels import Group
from .show.terminal import print_json, results

# On import NumPy's OpenBLAS starts a thread a core, each with its own memory; we never use it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_OPEN_FILES = 16_384


class _Nf4(Group):
    """The command nf4: its own options, and the commands."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        commands: Any = Commands()  # typer asks for a dict, and only reads it
        self.commands = commands

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, as --help shows them."""
        return list(self.commands)


app = typer.Typer(
    name="nf4",
    cls=_Nf4,
    help="Stream full-precision checkpoints into bitsandbytes NF4, and prove what was written.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a check failed, 2 usage, 3 bad or unsupported input, "
    "4 the machine (disk full, I/O error, no engine), 130 interrupted.",
)


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
    """Run the command line and end the process; a signal stops it, see stopping.py."""
    with stopping.listening():
        _main()


def _main() -> None:
    """Run a command, and turn an error into a message and an exit code."""
    from ..errors import (
        InterruptedRunError,
        Nf4Error,
        UnfinishedRunError,
        describe,
        exit_code_of,
    )

    _open_closed_streams()
    _allow_open_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the locale may not have all characters of a name
    json = "--json" in sys.argv[1:]
    _refuse_empty_words(json)
    try:
        # Under --json a mistake in the command line is raised here, and becomes a document.
        with stopping.hearing():
            code = app(standalone_mode=not json)
        sys.stdout.flush()
        sys.exit(code)
    except SystemExit:
        _flush_or_fail(json)
        raise
    except UnfinishedRunError as error:
        _fail(describe(error), error.exit_code, json)
    except MemoryError:
        _fail("the machine has not enough memory: free some, or use fewer --workers", 4, json)
    except InterruptedRunError as error:
        left = "" if error.leaves else "; nothing was left behind"
        _fail(describe(error) + left, error.exit_code, json)
    except (Nf4Error, OSError) as error:
        if isinstance(error, OSError) and results.begun and error.filename is None:
            _fail(_stdout_failed(error), 4, json)
        left = "; nothing was left behind" if isinstance(error, OSError) else ""
        _fail(describe(error) + left, exit_code_of(error), json)
    except Exception as error:
        # A mistake in the command line; typer's class has no public name in every version.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} (see nf4 --help)", 2, json)


def _refuse_empty_words(json: bool) -> None:
    """End the process with exit code 2 if an argument is empty, as "$MODEL" is where it is not set.

    An empty path would be the current directory.
    """
    for before, word in pairwise(["nf4", *sys.argv[1:]]):
        if not word:
            _fail(f"an empty argument after {before!r}: is its shell variable set?", 2, json)
        if word.startswith("--") and word.endswith("="):
            _fail(f"{word[:-1]} has an empty value: is its shell variable set?", 2, json)


def _open_closed_streams() -> None:
    """Open a stream that the caller closed (`2>&-`) on the null device.

    Else the first file that is opened would get its number, and what a library prints would go into
    that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _flush_or_fail(json: bool) -> None:
    """Flush stdout, so that no exit code says that output arrived that did not."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _fail(_stdout_failed(error), 4, json)


def _stdout_failed(error: OSError) -> str:
    reason = error.strerror or error
    return f"the work is done, but its result cannot be written to stdout: {reason}"


def _allow_open_files() -> None:
    """Raise the limit of open files: a conversion holds every shard open."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _fail(message: str, code: int, json: bool) -> None:
    """Print an error on stderr, under --json also as a document on stdout, and end the process."""
    from rich.console import Console

    from ..checkpoint.untrusted import printable

    console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
    console.print("[bold red]error:[/]", end=" ")
    console.print(printable(message), markup=False)
    try:
        if json:
            print_json("error", {"error": {"exit_code": code, "message": message}})
        sys.stdout.flush()
    except OSError:  # stdout failed: only the exit code can say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
