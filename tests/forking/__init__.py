"""Run programs of the tests in Pythons that have imported already what takes them seconds.

Each is a process of its own, with its own environment, streams and end; only its imports were made
before.  Not for what measures time, memory or imports, nor for a program that wants a terminal.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parent.parent / "build" / "forking"
"""Folder of the compiled launch.c; git ignores it."""

OF_NF4 = (
    "nf4cli.__main__", "nf4cli.cli.quantize", "nf4cli.cli.verify", "nf4cli.api.quantizing",
    "nf4cli.api.verifying", "nf4cli.api.verifying_bounded", "nf4cli.hub.carrier", "nf4cli.hub.push",
    "nf4cli.hub.outline", "nf4cli.engines.cpu", "nf4cli.engines.cupy_device", "typer._adapters",
    "rich.progress", "tqdm.auto", "safetensors", "xxhash", "encodings.idna",
    "huggingface_hub.hf_api!",
)  # fmt: skip
"""What the command imports.  huggingface_hub is imported anew: it takes its settings from the
environment."""
OF_LOADERS = ("torch", "transformers", "bitsandbytes", "safetensors.torch")
"""What programs import that load outputs, in either version of transformers."""


@cache
def command(python: Path, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words that run a program in a Python with these modules: its path or -c follows.

    The Python is started once, and ends with this process.
    """
    if sys.platform != "linux":
        return (str(python),)
    place = tempfile.TemporaryDirectory(prefix="nf4-tests-")
    path = f"{place.name}/socket"
    server = subprocess.Popen(
        [python, HERE / "server.py", path, *modules],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", f"{python} cannot import all of {modules}"

    def end() -> None:
        server.kill()
        server.wait()
        place.cleanup()

    atexit.register(end)
    return str(_launcher()), path


def nf4_command() -> tuple[str, ...]:
    """Return the words that run the installed command."""
    script = Path(sys.executable).with_name("nf4")
    return (*command(Path(sys.executable), OF_NF4), str(script))


def _launcher() -> Path:
    """Return the compiled launch.c."""
    source = HERE / "launch.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    BUILT.mkdir(parents=True, exist_ok=True)
    program = BUILT / f"launch-{digest}"
    with program.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            unfinished = program.with_suffix(".new")
            subprocess.run(["g++", "-x", "c", "-O1", source, "-o", unfinished], check=True)
            unfinished.replace(program)
    return program
