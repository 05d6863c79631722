"""A Python with modules imported that forks for each program that launch.c asks it to run.

A program, not a test:

    server.py SOCKET MODULE...

Importing transformers takes seconds, what nf4 uses half of one: the tests run hundreds of programs.
What a module takes from the environment when it is imported is the server's.  A module whose name
ends in "!" is imported and forgotten again, so that programs import it anew, but find what it
imports.  The server ends when its standard input does: with the process that started it.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

_NUMBER = struct.Struct("=i")


def receive(place: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]]:
    """Return (arguments, working directory, environment, standard streams) of a program."""
    streams = array.array("i")
    data, ancillary, *_ = place.recvmsg(1 << 20, socket.CMSG_SPACE(3 * streams.itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            streams.frombytes(content[: 3 * streams.itemsize])
    (length,) = struct.unpack_from("=I", data)
    while len(data) < length + 4:
        data += place.recv(1 << 20)
    (count,) = struct.unpack_from("=I", data, 4)
    words = [os.fsdecode(word) for word in data[8:].split(b"\0")[:-1]]
    arguments, directory, entries = words[:count], words[count], words[count + 1 :]
    environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return arguments, directory, environment, list(streams)


def watch(place: socket.socket, child: int) -> None:
    """Tell the other end how a child ends; kill the child if the other end goes away."""
    ended = os.pidfd_open(child)
    while True:
        ready, *_ = select.select([place, ended], [], [])
        if ended in ready:
            _, status = os.waitpid(child, 0)
            place.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))
            return
        if not place.recv(1):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return


def serve(path: str) -> tuple[list[str], str, dict[str, str], list[int]]:
    """Answer until the process is one that is to run a program; return that program."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the watching ones end
        while True:
            ready, *_ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                sys.exit()
            place, _ = server.accept()
            if os.fork():
                place.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = receive(place)
            child = os.fork()
            if child == 0:
                place.close()
                return program
            for stream in program[3]:
                os.close(stream)
            place.sendall(_NUMBER.pack(child))
            watch(place, child)
            os._exit(0)


def become(directory: str, environment: dict[str, str], streams: list[int]) -> None:
    """Take over what belongs to a process."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 - they stay open
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)


def run(arguments: list[str]) -> None:
    """Run a file, or with -c a text, as Python does."""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).absolute().parent)
    runpy.run_path(arguments[0], run_name="__main__")


def end(status: Any) -> None:
    """End as Python does, but leave the modules as they are: taking them apart takes a while.

    Args:
        status: as `sys.exit` takes it.
    """
    code = status if isinstance(status, int) else int(status is not None)
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined] - waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # as Python
    os._exit(code)


if __name__ == "__main__":
    for _name in sys.argv[2:]:
        importlib.import_module(_name.rstrip("!"))
    for _name in [name.rstrip("!") for name in sys.argv[2:] if name.endswith("!")]:
        for _module in [m for m in sys.modules if m.partition(".")[0] == _name.partition(".")[0]]:
            del sys.modules[_module]
    gc.collect()
    gc.freeze()  # so that a child's collections do not copy the pages of all this
    _arguments, *_rest = serve(sys.argv[1])
    become(*_rest)
    try:
        run(_arguments)
        end(0)
    except SystemExit as _end:
        end(_end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        end(1)
