"""Prints the section of CHANGELOG.md about a release: python scripts/release/notes.py v0.3.0.

Ends with 1 if the tag is not the version of the package, or has no section.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def notes(tag: str, version: str, changelog: str) -> str:
    """Return the lines below `## [version] - date`, up to the next version's.

    Args:
        tag: the tag in Git, like v0.3.0.
        version: the package's.
        changelog: the text of CHANGELOG.md.

    Raises:
        ValueError: the tag is another version's, or the changelog says nothing of it.
    """
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, the version in nf4cli/version.py is {version}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    section = re.search(heading, changelog, re.M | re.S)
    if section is None or not section[1].strip():
        raise ValueError(f"CHANGELOG.md has no section about {version} with a date")
    return section[1].strip() + "\n"


def main() -> None:
    """Print the notes of the tag that is named on the command line."""
    source = (ROOT / "nf4cli" / "version.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.M)
    try:
        sys.stdout.write(notes(sys.argv[1], version, (ROOT / "CHANGELOG.md").read_text()))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
