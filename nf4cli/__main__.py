"""The process of the command `nf4`, or `python -m nf4cli`, from its first line to its end."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading

from . import stopping


def main() -> None:
    """Run the command; a signal is taken from here on, before anything large is imported."""
    stopping.listen()
    # What imports make stays: looking through it for garbage again and again costs a tenth.
    gc.disable()
    from .cli import main as command

    gc.freeze()
    gc.enable()
    try:
        command()
    except SystemExit as end:
        stopping.ignore()
        _end_at_once(end.code)
        raise
    finally:
        stopping.ignore()


def _end_at_once(code: object) -> None:
    """End the process without taking its modules apart, which takes as long as a small command.

    That also spares the threads left behind, which may wait for the network in the native code of
    a library: Python's own end stops them there, and the process may end by SIGSEGV.

    Does nothing where Python's own end has more to do: to print a message, to report a stream that
    fails, or to let a profiler or debugger see the end.
    """
    if not (code is None or isinstance(code, int)):
        return
    if sys.getprofile() is not None or sys.gettrace() is not None or sys.flags.interactive:
        return
    if not stopping.was_raised():  # else nobody waits for a thread, which may take long
        threading._shutdown()  # type: ignore[attr-defined]  # waits for all but daemon threads
        atexit._run_exitfuncs()  # libraries' own cleanups, and temporary directories
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    main()
