"""Fetch the wheels that scripts/gpu_day installs on a machine with a GPU and without a network.

Fetched is what such a machine lacks, for CPython 3.12 on x86-64 Linux, and whatever that needs in
turn: every requirement is looked up, so nothing is missing there that was not known here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
PINNED = ("bitsandbytes", "compressed-tensors", "greenlet", "typer")
"""As pyproject.toml pins them for the tests."""
OTHERS = ("blake3", "lz4")
"""What else the package, and what the tests that a GPU runs, import."""
THERE = frozenset(
    """torch numpy transformers accelerate peft safetensors huggingface-hub tokenizers rich pyyaml
    xxhash packaging cupy-cuda13x nvidia-cuda-nvrtc scikit-build-core cmake ninja pytest
    pytest-timeout pytest-xdist hypothesis shellingham annotated-doc""".split()
)
"""What the machine has, in versions that are new enough; what was left out is brought along."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64")  # fmt: skip
MOST = 60_000_000  # bytes
MARKERS = {
    "python_version": "3.12", "python_full_version": "3.12.3", "platform_system": "Linux",
    "sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix", "extra": "",
    "implementation_name": "cpython", "platform_python_implementation": "CPython",
}  # fmt: skip


def pinned(name: str) -> str:
    """Return the requirement "name==version" of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(rf'"({name}==[^"; ]+)', text)
    if found is None:
        sys.exit(f"error: pyproject.toml pins no version of {name}")
    return found[1]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(directory: Path, requirement: str) -> None:
    """Fetch one wheel, without what it needs."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version", "3.12", "--implementation", "cp", *platforms,
         "--disable-pip-version-check", "-d", str(directory), requirement],
        check=True,
    )  # fmt: skip


def wheel_of(directory: Path, name: str) -> Path | None:
    """Return the wheel of a distribution, None where there is none."""
    wheels = directory.glob("*.whl")
    return next((p for p in wheels if canonical(p.name.split("-")[0]) == canonical(name)), None)


def requirements(wheel: Path) -> list[Requirement]:
    """Return what a wheel needs on the machine."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    found = [Requirement(x.partition(":")[2]) for x in lines if x.startswith("Requires-Dist:")]
    return [r for r in found if r.marker is None or r.marker.evaluate(MARKERS)]


def fetch(directory: Path) -> list[Path]:
    """Fetch everything; returns the wheels."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.whl"):
        old.unlink()
    wanted = [Requirement(r) for r in (*map(pinned, PINNED), *OTHERS)]
    while wanted:
        need = wanted.pop(0)
        there = wheel_of(directory, need.name)
        if there is None:
            download(directory, f"{need.name}{need.specifier}")
            there = wheel_of(directory, need.name)
            assert there is not None
            wanted += [r for r in requirements(there) if canonical(r.name) not in THERE]
        version = there.name.split("-")[1]
        if not need.specifier.contains(version, prereleases=True):
            sys.exit(f"error: {there.name} was fetched, and {need} is needed too")
    return sorted(directory.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / ".gpu-wheels")
    wheels = fetch(parser.parse_args().directory)
    total = sum(p.stat().st_size for p in wheels)
    for path in wheels:
        print(f"{path.stat().st_size:12,}  {path.name}")
    print(f"{total:12,}  bytes in {len(wheels)} wheels")
    if total > MOST:
        sys.exit(f"error: more than {MOST:,} bytes")


if __name__ == "__main__":
    main()
