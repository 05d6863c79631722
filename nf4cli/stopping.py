"""Stop when the user or the system asks for it (Ctrl-C, SIGTERM, SIGHUP), with nothing half done.

Every signal is noted.  While the command plans or reads, the signal handler raises
InterruptedRunError at once, wherever the main thread is.  Within a block of `held_back` (a run
with a workspace, threads being joined, a display being closed) only `check` raises it, between two
steps.  So no signal breaks off a cleanup, a lock or a rename, and none gets lost.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from .errors import InterruptedRunError, UnfinishedRunError

Answer = TypeVar("Answer")

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_EVERY = 0.1  # seconds between two checks for a stop, while threads are joined
_AGAIN = 0.01  # seconds until a stop is raised again, if it came inside a destructor


class _State:
    """Which signals this process has received, and what it did about them.

    Attributes:
        listening: whether our handlers are installed.
        held: number of nested `held_back` blocks that the main thread is in.
        asked: whether a signal has come.
        raised: whether it was raised; the run is then being cleaned up.
        settled: whether the result is complete; a signal that comes later is ignored.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every signal and every block."""
        self.listening = self.asked = self.raised = self.settled = False
        self.held = 0


_state = _State()


def listen() -> None:
    """Install our signal handlers, which hold signals back until the block of `hearing`.

    They stay until the process ends, or until the block of `listening` that called this ends.
    Does nothing if they are installed, or outside the main thread.
    """
    if _state.listening or not _is_main_thread():
        return
    _state.reset()
    _state.held, _state.listening = 1, True
    for number in _SIGNALS:
        signal.signal(number, _take)
    sys.unraisablehook = _take_unraisable


def listen_again() -> None:
    """Install our signal handlers once more, after a library has put its own in their place."""
    if _state.listening and _is_main_thread():
        for number in _SIGNALS:
            signal.signal(number, _take)


def ignore() -> None:
    """Ignore every further signal: the process is ending, and its exit code is decided."""
    for number in _SIGNALS if _is_main_thread() else ():
        signal.signal(number, signal.SIG_IGN)


class listening:  # noqa: N801 - read as a word of its with statement
    """Install our signal handlers for a block, and the earlier ones again at its end.

    Does nothing if our handlers are installed already, or outside the main thread.
    """

    def __enter__(self) -> None:
        self._before: list[Any] = []
        if not _state.listening and _is_main_thread():
            self._before = [signal.getsignal(number) for number in _SIGNALS]
            self._hook = sys.unraisablehook
            listen()

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, before in zip(_SIGNALS, self._before, strict=True):
                signal.signal(number, before if before is not None else signal.SIG_DFL)
            sys.unraisablehook = self._hook
            _state.reset()


class hearing:  # noqa: N801
    """Mark the block, after `listen`, in which a signal is raised at once unless `held_back`.

    Raises:
        InterruptedRunError: a signal came before the block or within it.  It replaces any other
            error that a library raised because of the signal.
    """

    def __enter__(self) -> None:
        _state.held -= 1
        try:
            check()
        except InterruptedRunError:
            _state.held += 1
            raise

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        _state.held += 1
        reports_a_stop = (type(None), InterruptedRunError, UnfinishedRunError)
        succeeded = isinstance(error, SystemExit) and not error.code
        if _state.raised and not (succeeded or isinstance(error, reports_a_stop)):
            raise InterruptedRunError("interrupted") from error


class held_back:  # noqa: N801
    """Hold back a signal that comes within the block, until `check` or the end of the block.

    Raises:
        InterruptedRunError: a signal came; raised at the end of the outermost such block, unless
            that ends with an error.
    """

    def __enter__(self) -> None:
        if _is_main_thread():
            _state.held += 1

    def __exit__(self, kind: object, *_: object) -> None:
        if _is_main_thread():
            _state.held -= 1
            if kind is None and not _state.held and not _state.raised:
                check()


class finishing(held_back):  # noqa: N801
    """Hold signals back, like `held_back`, in the block that makes the command's result.

    If the outermost such block ends without an error, the result is complete, and a signal is
    ignored from then on.
    """

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and _state.held == 1 and _is_main_thread():
            _state.settled = True
        super().__exit__(kind)


class whole(Generic[Answer]):  # noqa: N801
    """Make, enter and leave a context manager with signals held back.

    So a signal can come neither before `__exit__` is sure to be called nor while it cleans up.

    Args:
        make: makes the context manager.

    Raises:
        InterruptedRunError: a signal came while it was entered or left.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Answer]]) -> None:
        self._make = make

    def __enter__(self) -> Answer:
        entered = False
        try:
            with held_back():
                self._inner = self._make()
                value = self._inner.__enter__()
                entered = True
        except InterruptedRunError:
            if entered:
                self._inner.__exit__(None, None, None)
            raise
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        with held_back():
            return self._inner.__exit__(kind, error, trace)


def check() -> None:
    """Raise InterruptedRunError if a signal has come; call it between two steps, in any thread."""
    if _state.asked and not _state.settled:
        _state.raised = True
        raise InterruptedRunError("interrupted")


def was_raised() -> bool:
    """Return whether a signal was raised, so that the command ends because of it."""
    return _state.raised


def join(threads: Iterable[threading.Thread], until: Callable[[], object] = lambda: False) -> None:
    """Wait until the threads have ended, or until `until` returns a true value.

    Signals are held back meanwhile: an exception within Thread.join can make Python, up to 3.12,
    take a running thread for an ended one.

    Raises:
        InterruptedRunError: a signal came; the threads go on.
    """
    with held_back():
        for thread in threads:
            while thread.is_alive() and not until():
                check()
                thread.join(_EVERY)


def leave_behind(call: Callable[[], Answer]) -> Answer:
    """Return the result of `call()`, which may wait for the network for any length of time.

    It runs in a daemon thread.  A stop does not wait for that thread, which ends with the process.

    Raises:
        InterruptedRunError: a signal came; how far the call got is not known.
        Exception: what `call` raises.
    """
    answers: list[Answer] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="nf4-left-behind", daemon=True)
    thread.start()
    join([thread])
    if failures:
        raise failures[0]
    return answers[0]


def _take(number: int, frame: FrameType | None) -> None:
    """Note a signal; raise it, the first time, unless it is held back or comes too late."""
    _state.asked = True
    if not (_state.held or _state.raised or _state.settled):
        check()


def _take_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Raise a stop again that was lost, because it came within a destructor, which cannot raise."""
    if not isinstance(unraisable.exc_value, InterruptedRunError):
        sys.__unraisablehook__(unraisable)
        return
    _state.raised = False
    again = threading.Timer(_AGAIN, _send_to_main_thread)
    again.daemon = True
    again.start()


def _send_to_main_thread() -> None:
    """Send a signal that also ends a wait of the main thread, which interrupt_main does not."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
