"""Try again what fails for a reason that may pass: the network, or a server that is busy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from ..callbacks import Notify, no_notice
from ..errors import InterruptedRunError, MachineError, UsageError
from .errors import is_offline

_LONGEST_FIRST_WAIT = 600  # seconds
_ATTEMPTS = 5
Answer = TypeVar("Answer")


def first_wait() -> float:
    """Return the seconds to wait after a first failure: one, or what NF4_HUB_WAIT says.

    Raises:
        UsageError: that is no number, or out of range.
    """
    text = os.environ.get("NF4_HUB_WAIT", "1")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_FIRST_WAIT:
        raise UsageError(
            f"NF4_HUB_WAIT is {text!r}, expected seconds from 0 to {_LONGEST_FIRST_WAIT}"
        )
    return seconds


class Retries:
    """Count the failures of one piece of work, and wait between its attempts, ever longer.

    Args:
        notify: told of every failure that is not the last.
        stop: ends a wait.
        attempts: after so many failures in a row the work is given up.

    Raises:
        UsageError: see `first_wait`.
    """

    def __init__(
        self,
        notify: Notify = no_notice,
        stop: threading.Event | None = None,
        attempts: int = _ATTEMPTS,
    ) -> None:
        self._notify = notify
        self._stop = stop or threading.Event()
        self._attempts = attempts
        self._first = first_wait()
        self._failures = 0

    def failed(self, error: MachineError, progress: bool = False, at_least: float = 0.0) -> None:
        """Count a failure, and wait until the next attempt is due.

        Args:
            progress: the attempt brought something, so it does not count as a failure.
            at_least: seconds to wait, as a server asked for.

        Raises:
            MachineError: `error`, after the last attempt, or where the user forbade the network.
            InterruptedRunError: `stop` was set.
        """
        self._failures = 0 if progress else self._failures + 1
        if self._failures >= self._attempts or is_offline():
            raise error
        seconds = max(at_least, self._first * 2.0 ** max(0, self._failures - 1))
        self._notify(f"{error}. The next attempt is in {seconds:.0f} s")
        if self._stop.wait(seconds):
            raise InterruptedRunError("interrupted") from None


def persist(
    work: Callable[[], Answer], notify: Notify = no_notice, stop: threading.Event | None = None
) -> Answer:
    """Return what `work` returns, called again after a MachineError, a few times.

    Args:
        notify: told of every failure that is not the last.
        stop: ends a wait.

    Raises:
        MachineError: what `work` raised the last time.
        InterruptedRunError: `stop` was set.
    """
    retries = Retries(notify, stop)
    while True:
        try:
            return work()
        except MachineError as error:
            retries.failed(error)
