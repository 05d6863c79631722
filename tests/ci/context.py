"""What a container is built from, and the one wheel that the tests build of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def copy_context(place: Path) -> Path:
    """The build context: the checkout's files that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]

    def ignored(path: Path) -> bool:
        relative, verdict = path.relative_to(ROOT), False
        for rule in rules:
            pattern = rule.removeprefix("!")
            anywhere = pattern.startswith("**/")
            candidates = [relative, *relative.parents]
            names = [p.name if anywhere else str(p) for p in candidates]
            if any(fnmatch(name, pattern.removeprefix("**/")) for name in names if name):
                verdict = not rule.startswith("!")
        return verdict

    for file in ROOT.iterdir():
        found = [file, *(file.rglob("*") if file.is_dir() and not ignored(file) else ())]
        for path in found:
            if path.is_file() and not ignored(path):
                target = place / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
    return place


def build_wheel(context: Path, place: Path) -> Path:
    """pip and a compiler make a wheel of a build context, as `pip install .` does first."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--wheel-dir", place, context],
        check=True,
    )  # fmt: skip
    (wheel,) = place.glob("nf4cli-*.whl")
    return wheel


def alone() -> dict[str, str]:
    """Environment in which pip installs a wheel without what it depends on, which is the tests'."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return {**os.environ, "PIP_NO_DEPS": "1", "PIP_IGNORE_INSTALLED": "1",
            "PYTHONPATH": os.pathsep.join(packages)}  # fmt: skip


if __name__ == "__main__":  # scripts/bootstrap.sh: the wheel in the folder that is named
    with tempfile.TemporaryDirectory() as temporary:
        build_wheel(copy_context(Path(temporary)), Path(sys.argv[1]))
