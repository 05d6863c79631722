"""Report how far an upload through the Hub's storage library (hf_xet) has come.

huggingface_hub hands that library a path, so nf4 cannot count reads, and it draws progress bars of
its own, which cannot stand beside ours.  A shard may take half an hour.  So its function
`get_xet_session` is replaced by one whose sessions report to nf4 as well.  Where a version has no
such function, a file counts when it is complete.
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
    """A session of hf_xet whose uploads report.

    Args:
        session: the session that does the work.
        position: told the bytes of the file that are on the Hub.
    """

    def __init__(self, session: Any, position: Position) -> None:
        self._session, self._position = session, position

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def new_upload_commit(self, **settings: Any) -> Any:
        return self._session.new_upload_commit(**{**settings, "progress_callback": self._report})

    def _report(self, group: Any, *_: object) -> None:
        """Report the bytes that are done; those that the storage has already are among them."""
        self._position(int(getattr(group, "total_bytes_completed", 0)))


@contextmanager
def reporting(position: Position) -> Iterator[None]:
    """Report, within the block, how far this thread's upload of one file is."""
    _report_sessions()
    _thread.position = position
    try:
        yield
    finally:
        _thread.position = None


def _report_sessions() -> None:
    """Replace huggingface_hub's function that returns the session, once."""
    try:
        from huggingface_hub.utils import _xet
    except ImportError:  # a private module, which a version may not have
        return
    theirs = getattr(_xet, "get_xet_session", None)
    if theirs is None or hasattr(theirs, "of_nf4"):
        return

    def get_xet_session() -> Any:
        position = getattr(_thread, "position", None)
        return theirs() if position is None else _Session(theirs(), position)

    get_xet_session.of_nf4 = True  # type: ignore[attr-defined]
    _xet.get_xet_session = get_xet_session
