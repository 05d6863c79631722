"""Builds, checks and tries a release's files: scripts/wheels runs this in its environment."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from building import build_sdist, build_wheel, run, unpack
from checking import check_wheel, must
from platforms import NATIVE, PLATFORMS, Platform
from trying import call_library, use_wheel


def build_twice(platforms: list[Platform], work: Path) -> list[Path]:
    """Build all in two places; return the sdist and the wheels. Raise SystemExit if two differ.

    The second place has a longer name, and the wheels there come from the second sdist.
    """
    places = (work / "first", work / "the-second")
    made = [[build_sdist(place)] for place in places]
    for place, files in zip(places, made, strict=True):
        source = unpack(files[0], place)
        files.extend(build_wheel(source, p, place / p.tag) for p in platforms)
    for first, second in zip(*made, strict=True):
        must(first.read_bytes() == second.read_bytes(), f"two builds of {first.name} differ")
        print(f"built {first.name}, {first.stat().st_size} bytes, twice the same", flush=True)
    return made[0]


def main() -> None:
    """Parse the command line and make the files."""
    parser = argparse.ArgumentParser(prog="scripts/wheels", description=__doc__)
    tags = [platform.tag for platform in PLATFORMS]
    parser.add_argument("--only", action="append", choices=tags, metavar="TAG")
    parser.add_argument("dir", nargs="?", default="dist", type=Path)
    options = parser.parse_args()
    target: Path = options.dir
    if target.exists() and any(target.iterdir()):
        parser.error(f"{target} is not empty")
    platforms = [p for p in PLATFORMS if not options.only or p.tag in options.only]
    with tempfile.TemporaryDirectory(prefix="wheels-") as temporary:
        work = Path(temporary)
        files = build_twice(platforms, work)
        run("twine", "check", "--strict", files[0])
        used = work / "used"
        used.mkdir()
        for platform, wheel in zip(platforms, files[1:], strict=True):
            library = check_wheel(wheel, platform, work / "checked" / platform.tag)
            said = f"{platform.tag}: checked"
            if platform == NATIVE:
                said += f"; installed, {use_wheel(wheel, used)} converts and verifies"
            if (used / "packed").exists():
                isas = call_library(library, platform, used, work / "called" / platform.tag)
                said += f"; ran {', '.join(isas)}" if isas else "; nothing here runs it"
            print(said, flush=True)
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, target)
    print(f"{len(files)} files in {target}")


if __name__ == "__main__":
    main()
