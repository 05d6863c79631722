"""Stop when the user or the system asks for it (Ctrl-C, SIGTERM, SIGHUP), with nothing half done.

A signal is always noted.  Where nothing is at stake (planning, reading) it is raised at once, as
InterruptedRunError, wherever the main thread is.  Within `held_back` (a run with a workspace,
threads being joined, a display being closed) it is raised by `check` alone, between two steps.  So
no signal breaks off a cleanup, a lock or a rename, and none gets lost.
"""

from __future__ import annotations

import _thread
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
_EVERY = 0.1  # seconds between two looks, while threads are waited for
_AGAIN = 0.01  # seconds until a stop is raised again that came where nothing can be raised


class _State:
    """What the signals of this process have come to.

    Attributes:
        listening: our handlers are installed.
        held: blocks of `held_back` that the main thread is in.
        asked: a signal has come.
        raised: it was raised, so the run is being cleaned up.
        settled: the result is there; whatever comes now comes too late.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.listening = self.asked = self.raised = self.settled = False
        self.held = 0


_state = _State()


def listen() -> None:
    """Take the signals, held back until `hearing`; for the rest of the process, or `listening`."""
    if _state.listening or not _is_main_thread():
        return
    _state.reset()
    _state.held, _state.listening = 1, True
    for number in _SIGNALS:
        signal.signal(number, _take)
    sys.unraisablehook = _take_unraisable


def ignore() -> None:
    """Hear nothing any more: the process ends, and its exit code is decided."""
    for number in _SIGNALS if _is_main_thread() else ():
        signal.signal(number, signal.SIG_IGN)


class listening:  # noqa: N801 - read as a word of its with statement
    """Take the signals within a block, unless somebody outside of it does so already."""

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
    """Within `listen`: the block in which a signal is raised at once, but for what holds it back.

    Raises:
        InterruptedRunError: a signal came before, or comes; whatever error a library has made of
            it.
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
        told = (type(None), InterruptedRunError, UnfinishedRunError)
        done = isinstance(error, SystemExit) and not error.code
        if _state.raised and not (done or isinstance(error, told)):
            raise InterruptedRunError("interrupted") from error


class held_back:  # noqa: N801
    """Let a signal wait that comes within the block, until `check` or the end of the block.

    Raises:
        InterruptedRunError: at the end of the outermost such block, unless it ends with an error.
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
    """Like `held_back`, for the block that makes what the command is for.

    When the outermost such block has ended well, a stop comes too late and is not raised.
    """

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and _state.held == 1 and _is_main_thread():
            _state.settled = True
        super().__exit__(kind)


class whole(Generic[Answer]):  # noqa: N801
    """Make, enter and leave a context manager with signals held back: what it makes, it removes."""

    def __init__(self, make: Callable[[], AbstractContextManager[Answer]]) -> None:
        self._make = make

    def __enter__(self) -> Answer:
        entered = False
        try:
            with held_back():
                self._inner = self._make()
                made = self._inner.__enter__()
                entered = True
        except InterruptedRunError:
            if entered:
                self._inner.__exit__(None, None, None)
            raise
        return made

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        with held_back():
            return self._inner.__exit__(kind, error, trace)


def check() -> None:
    """Raise InterruptedRunError if a stop was asked for; from any thread, between two steps."""
    if _state.asked and not _state.settled:
        _state.raised = True
        raise InterruptedRunError("interrupted")


def was_raised() -> bool:
    """Return whether a stop is why the command ends."""
    return _state.raised


def join(threads: Iterable[threading.Thread], until: Callable[[], object] = lambda: False) -> None:
    """Wait for threads to end, or until something holds.

    An exception within Thread.join can make Python (to 3.12) take a running thread for an ended
    one, so signals are held back there.

    Raises:
        InterruptedRunError: a stop was asked for; the threads go on.
    """
    with held_back():
        for thread in threads:
            while thread.is_alive() and not until():
                check()
                thread.join(_EVERY)


def leave_behind(call: Callable[[], Answer]) -> Answer:
    """Return what `call` returns, which may wait for the network for as long as it likes.

    It runs in a thread of its own, which a stop does not wait for: it ends with the process.

    Raises:
        InterruptedRunError: a stop was asked for; nobody knows how far the call came.
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
    """Note a signal; raise it where it may be, the first time."""
    _state.asked = True
    if not (_state.held or _state.raised or _state.settled):
        check()


def _take_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Raise a stop again that came while Python called a destructor, which cannot raise."""
    if not isinstance(unraisable.exc_value, InterruptedRunError):
        sys.__unraisablehook__(unraisable)
        return
    _state.raised = False
    again = threading.Timer(_AGAIN, _thread.interrupt_main)
    again.daemon = True
    again.start()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
