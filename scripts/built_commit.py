"""Build the package of any commit beside this one, for scripts that measure one against another."""

from __future__ import annotations

import compileall
import io
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_START = "start_nf4.py"
_PARTS = ("CMakeLists.txt", "cuda", "nf4cli")
"""What the compiled library and the package are made of."""


def built(commit: str | None, place: Path, compiler: str | None = None) -> Path:
    """Build a commit's package in a folder, where `command` runs it.

    Args:
        commit: None for the files of this working tree.
        place: a folder to make; returned.
        compiler: the C++ compiler with its options; None for the machine's.

    Raises:
        CalledProcessError: git has no such commit, or it does not compile.
    """
    place.mkdir(parents=True)
    if commit is None:
        for part in _PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, place / part)  # type: ignore[operator]
    else:
        packed = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, *_PARTS], check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(place, filter="data")
    chosen = [f"-DCMAKE_CXX_COMPILER={';'.join(shlex.split(compiler))}"] if compiler else []
    build = place / "build"
    for command in (
        ["cmake", "-S", place, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *chosen],
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.copy(build / "_nf4.so", place / "nf4cli" / "engines" / "_nf4.so")
    compileall.compile_dir(place / "nf4cli", quiet=1)
    (place / _START).write_text("from nf4cli.__main__ import main\nmain()\n")
    return place


def library(package: Path) -> Path:
    """Return the compiled library of a built package."""
    return package / "nf4cli" / "engines" / "_nf4.so"


def command(package: Path) -> list[str]:
    """Return the words that run a built package's command: the script's folder has the package."""
    return [sys.executable, str(package / _START)]
