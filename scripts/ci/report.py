#!/usr/bin/env python3
"""What a GitHub job wants of one JSON document of nf4's: lines for GITHUB_OUTPUT on stdout, and an
annotation on stderr where the document is an error or has findings. Standard library only.

Usage: report.py DOCUMENT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def outputs(document: dict[str, Any]) -> list[str]:
    """NAME=VALUE for each of the action's outputs that the document knows."""
    pushed = document.get("pushed") or {}
    found = {"bits-per-weight": document.get("bits_per_weight"), "commit": pushed.get("commit")}
    return [f"{name}={_line(value)}" for name, value in found.items() if value is not None]


def annotations(document: dict[str, Any]) -> list[str]:
    """Commands to the runner; at most ten, since GitHub shows no more of a step."""
    if document["nf4"] == "error":
        messages = [document["error"]["message"]]
    else:
        messages = [finding["message"] for finding in document.get("findings", ())]
    return [f"::error title=nf4::{_escape(message)}" for message in messages[:10]]


def _line(value: object) -> str:
    """Never two lines: the second would set another output."""
    return " ".join(str(value).split())


def _escape(message: str) -> str:
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def main() -> None:
    text = Path(sys.argv[1]).read_text()
    try:
        document = json.loads(text)
    except ValueError:  # killed before it could say anything, or a bug: the log has its traceback
        print("::error title=nf4::nf4 left no report: see the log", file=sys.stderr)
        return
    for line in outputs(document):
        print(line)
    for line in annotations(document):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
