"""The callbacks through which long work reports: notices in words, and bytes done."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Called with a sentence that a user should read about an engine; from any thread."""


def no_notice(sentence: str) -> None:
    """Drop the notice: the Notify for callers that show none."""


Progress = Callable[[str, int], None]
"""Called with (name of the file or tensor at work, bytes done since the last call); from any
thread."""


def no_progress(what: str, count: int) -> None:
    """Ignore the progress: the Progress for callers that show none."""
