"""GITHUB_STEP_SUMMARY: a section on the page of a GitHub Actions job, where that is set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from . import common


def append(section: Callable[[], str]) -> None:
    """Add a section; a failure is a note, since the command itself has done its work.

    Args:
        section: makes the text, and is not called outside of GitHub Actions.
    """
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    from .. import summary
    from ..errors import MachineError

    try:
        summary.append(section(), Path(place))
    except MachineError as error:
        common.note(f"no summary was written to GITHUB_STEP_SUMMARY: {error}")
