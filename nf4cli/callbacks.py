"""What long work is given to report through: notices in words, and bytes done."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Told, in a sentence, what a user should know of an engine; from any thread."""


def no_notice(sentence: str) -> None:
    """The Notify that drops it."""


Progress = Callable[[str, int], None]
"""Told (what is being worked on, bytes done since the last call), from any thread."""


def no_progress(what: str, count: int) -> None:
    """The Progress that shows nothing."""
