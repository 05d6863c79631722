"""Run `nf4` inside the test process: the same entry point, arguments, output and exit code.

A process of its own costs a second, mostly for imports. A test needs one (`helpers.nf4_process`)
when its subject is what belongs to a process: signals, terminals and closed streams, stdin,
environment variables that libraries read on import, which modules are loaded, memory, limits, or a
crash.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from nf4cli import stopping
from nf4cli.cli import main
from nf4cli.cli.show import terminal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def run_inside(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Return what `nf4 ARGUMENTS` printed and its exit code, run in this process.

    Args:
        cwd: the working directory meanwhile (default: the present one).
    """
    words = ["nf4", *map(str, arguments)]
    with _file() as out, _file() as err:
        with _process_state(words, cwd, out, err):
            code = _exit_code(err)
        return subprocess.CompletedProcess(words, code, _text(out), _text(err))


def _exit_code(err: TextIO) -> int:
    """Run the entry point as the installed script does; a bug prints its traceback and gives 1."""
    try:
        with stopping.listening():
            main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        err.write(f"{end.code}\n")
        return 1
    except Exception:
        traceback.print_exc(file=err)
        return 1
    return 0


@contextmanager
def _process_state(words: list[str], cwd: Path | None, out: TextIO, err: TextIO) -> Iterator[None]:
    """Give the command what a new process has, and put everything back that it may change."""
    place, argv, environment = Path.cwd(), sys.argv, dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as restored:
        restored.callback(_forget_last_run)
        restored.callback(resource.setrlimit, resource.RLIMIT_NOFILE, files)
        restored.callback(_restore_environment, environment)
        restored.callback(setattr, sys, "argv", argv)
        restored.callback(os.chdir, place)
        for number, handler in handlers.items():
            restored.callback(signal.signal, number, handler)
        restored.enter_context(redirect_stdout(out))
        restored.enter_context(redirect_stderr(err))
        restored.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning  # pytest would keep it from stderr
        # Threads of other libraries write to pipes too: a closed one must not end pytest.
        restored.callback(setattr, terminal, "end_at_closed_pipe", terminal.end_at_closed_pipe)
        terminal.end_at_closed_pipe = lambda: None
        _forget_last_run()
        sys.argv = words
        if cwd is not None:
            os.chdir(cwd)
        yield


def _forget_last_run() -> None:
    """Reset what the package remembers for the life of a process: its console, a result shown."""
    terminal.err_console.cache_clear()
    terminal.results.begun = False


def _restore_environment(before: dict[str, str]) -> None:
    """Set environment variables as they were, and remove new ones."""
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    """Print a warning on the command's stderr, as Python does."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _file() -> Any:
    """Open a stream with a real descriptor, which the command may ask for."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", newline="")


def _text(stream: TextIO) -> str:
    """Return all that was written, with line ends as `subprocess` reads them."""
    stream.flush()
    stream.seek(0)
    return stream.read().replace("\r\n", "\n").replace("\r", "\n")
