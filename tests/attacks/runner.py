"""Runs nf4 command lines in forked children under limits: python runner.py GOOD < jobs.json.

One interpreter imports everything once, by running every command over a good output; each job is a
fork of it, so hundreds of attacks take seconds.  A child may use 3 GB of addresses and 30 s, and
says which files below `outside` it opened.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress

import typer.main

import nf4cli.cli
import nf4cli.errors

_CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
ADDRESSES = 3 << 30
SECONDS = 30


def child(job: dict, stdout: str, stderr: str) -> None:
    for path, fd in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), fd)
    os.chdir(job["cwd"])
    outside = os.path.realpath(job["outside"])
    opened = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            real = os.path.realpath(os.fsdecode(arguments[0]))
            if real.startswith(outside) or real == "/etc/passwd":
                opened.append(real)
        if event in _CODE:
            opened.append(f"{event}: {arguments!r}"[:200])

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    signal.alarm(SECONDS)
    faulthandler.enable()
    sys.argv = ["nf4", *job["arguments"]]
    sys.addaudithook(watch)
    code = 0
    try:
        nf4cli.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    if opened:
        os.write(2, f"\nOPENED {opened!r}\n".encode())
    os._exit(code)


def warm_up(good: str) -> None:
    with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink):  # noqa: PTH123
        for line in (["inspect", good], ["verify", good, "--engine", "cpu"],
                     ["quantize", good], ["dequantize", good, good]):  # fmt: skip
            with suppress(SystemExit, nf4cli.errors.Nf4Error):
                nf4cli.cli.app(line)


def main() -> None:
    warm_up(sys.argv[1])
    nf4cli.cli.app = typer.main.get_command(nf4cli.cli.app)  # half of a command's time
    results = []
    for job in json.load(sys.stdin):
        files = [os.path.join(job["outside"], f".{fd}-{os.getpid()}") for fd in (1, 2)]
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(job, *files)
        _, status, usage = os.wait4(pid, 0)
        texts = []
        for name in files:
            with open(name, "rb") as file:  # noqa: PTH123
                texts.append(file.read().decode("utf-8", "surrogateescape"))
            os.unlink(name)  # noqa: PTH108
        results.append({
            "code": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1],
            "peak": usage.ru_maxrss * 1024, "seconds": time.monotonic() - started,
        })  # fmt: skip
    json.dump(results, sys.stdout)


main()
