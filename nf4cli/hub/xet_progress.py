"""How far an upload through the Hub's storage library (hf_xet) has come.

huggingface_hub hands that library a path, so that no read of ours can be counted, and has its
reports drawn as bars of its own, which we cannot have beside ours.  A shard may take half an hour.
So the session that it takes from its own `get_xet_session` is one that reports to us as well; where
a version has no such function, a file counts when it is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Position = Callable[[int], None]
"""Told how many bytes of a file are on the Hub, from any thread."""

_thread = threading.local()


class _Session:
    """hf_xet's session, whose uploads report."""

    def __init__(self, session: Any, position: Position) -> None:
        self._session, self._position = session, position

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def new_upload_commit(self, **settings: Any) -> Any:
        return self._session.new_upload_commit(**{**settings, "progress_callback": self._report})

    def _report(self, group: Any, *_: object) -> None:
        """Bytes that need no transfer, as the storage has them, are counted as well."""
        self._position(int(getattr(group, "total_bytes_completed", 0)))


@contextmanager
def reporting(position: Position) -> Iterator[None]:
    """Has an upload of one file by this thread tell how far it is."""
    _report_sessions()
    _thread.position = position
    try:
        yield
    finally:
        _thread.position = None


def _report_sessions() -> None:
    """Put ours in the place of huggingface_hub's function, once."""
    try:
        from huggingface_hub.utils import _xet
    except ImportError:  # it is private, and may move
        return
    theirs = getattr(_xet, "get_xet_session", None)
    if theirs is None or hasattr(theirs, "of_nf4"):
        return

    def get_xet_session() -> Any:
        position = getattr(_thread, "position", None)
        return theirs() if position is None else _Session(theirs(), position)

    get_xet_session.of_nf4 = True  # type: ignore[attr-defined]
    _xet.get_xet_session = get_xet_session
