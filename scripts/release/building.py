"""Builds the source distribution and, from it, a wheel for any platform."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from platforms import Platform

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ZIG = Path(sysconfig.get_path("purelib")) / "ziglang" / "zig"
EPOCH = "1580601600"  # 2020-02-02, the time of every file: the same at every build


def run(*command: object, **more: str) -> str:
    """Run a command and return what it printed.

    Args:
        command: the program and its arguments.
        more: environment variables beside those of this process.

    Raises:
        SystemExit: it failed; the message has its output.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, env={**os.environ, **more}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nerror: exit code {done.returncode}: {' '.join(words)}")
    return done.stdout


def build_sdist(place: Path) -> Path:
    """Build the source distribution of the checkout in a directory; return its path."""
    run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", place, ROOT,
        SOURCE_DATE_EPOCH=EPOCH,
    )  # fmt: skip
    (sdist,) = place.glob("nf4cli-*.tar.gz")
    return sdist


def unpack(sdist: Path, place: Path) -> Path:
    """Unpack a source distribution in a directory; return the folder with pyproject.toml."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    return place / sdist.name.removesuffix(".tar.gz")


def build_wheel(source: Path, platform: Platform, place: Path) -> Path:
    """Build a wheel for a platform from an unpacked source distribution; return its path."""
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "wheel.tags": f"py3-none-{platform.tag}",
        "build-dir": place / "cmake",  # a directory's compiler is the one that CMake found first
        "cmake.define.CMAKE_TOOLCHAIN_FILE": HERE / "zig.cmake",
        "install.strip": "false",  # the machine's own strip may not know the format: zig.cmake does
    }
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place,
        *(f"-C{name}={value}" for name, value in settings.items()), source,
        SOURCE_DATE_EPOCH=EPOCH, NF4_ZIG=str(ZIG), NF4_ZIG_TARGET=platform.zig,
    )  # fmt: skip
    (wheel,) = place.glob(f"nf4cli-*-py3-none-{platform.tag}.whl")
    return wheel
