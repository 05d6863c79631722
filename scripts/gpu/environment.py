"""An environment of its own on a machine without a network: wheels and this checkout over what is
installed there, which stays as it is.

Its site-packages are links to those of the interpreter that makes it, and beside them, in their
place where both have something, what was installed from wheels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

_SCRIPT = """#!{python}
import sys
from nf4cli.cli import main
sys.exit(main())
"""


def make(place: Path, wheels: Iterable[Path], checkout: Path | None) -> Path:
    """Make an environment; returns its interpreter.

    Args:
        checkout: of nf4cli, to build and install as well; None where a wheel of it is given.

    Raises:
        RuntimeError: pip failed; the message holds what it said.
    """
    shutil.rmtree(place, ignore_errors=True)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(place)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = place / "lib" / version / "site-packages"
    for what in (*wheels, *([checkout] if checkout else [])):
        _install(site, what)
    mine = {_dist_name(p) for p in site.glob("*.dist-info")}
    for there in _there():
        for entry in there.iterdir():
            hidden = entry.name.endswith(".dist-info") and _dist_name(entry) in mine
            if not hidden and entry.name != "__pycache__" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    python = place / "bin" / "python"
    script = place / "bin" / "nf4"
    script.write_text(_SCRIPT.format(python=python))
    script.chmod(0o755)
    return python


def _install(site: Path, what: Path) -> None:
    """Install a wheel or a checkout, without its dependencies and without a network."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
         "--no-build-isolation", "--no-compile", "--no-cache-dir", "--disable-pip-version-check",
         "--upgrade", "--target", str(site), str(what)],
        capture_output=True, check=False, text=True, timeout=300,
        env=variables(Path(sys.executable).parent),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pip could not install {what.name}:\n{done.stdout}{done.stderr}")


def _there() -> list[Path]:
    """The directories that this interpreter finds installed packages in, the first one first."""
    known = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    known += [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    return [p for p in dict.fromkeys(known) if p.is_dir()]


def _dist_name(path: Path) -> str:
    return re.sub(r"[-_.]+", "-", path.name.partition("-")[0]).lower()


def variables(bin_directory: Path) -> dict[str, str]:
    """Return this process's environment with a directory of programs in front."""
    paths = [str(bin_directory), os.environ.get("PATH", os.defpath)]
    return {**os.environ, "PATH": os.pathsep.join(paths)}


CHECK = """
import importlib.metadata as metadata, json
from packaging.requirements import Requirement
wrong, there = [], {}
for name in ("nf4cli", "typer", "pydantic", "bitsandbytes", "transformers", "accelerate", "peft"):
    try:
        lines, there[name] = metadata.requires(name) or [], metadata.version(name)
    except metadata.PackageNotFoundError:
        wrong.append(f"{name} is not installed")
        continue
    for line in lines:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} needs {need}, which is not installed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} needs {need}, and {version} is installed")
for name in ("torch", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "numpy", "safetensors"):
    try:
        there[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps({"versions": there, "wrong": wrong}))
"""
"""Says, as JSON, which versions an environment has and which requirements it does not meet."""
