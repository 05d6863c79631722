"""The errors a user can meet, each with the exit code the command line returns for it.

A message names the object, what was found, what was expected and what to do next.  What is
neither an Nf4Error nor an OSError is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno


class Nf4Error(Exception):
    """Base class: what the command line turns into a message, beside the system's OSError."""

    exit_code = 3


class UsageError(Nf4Error):
    """The options do not fit together or do not fit the model (exit code 2)."""

    exit_code = 2


class InputError(Nf4Error):
    """The input is damaged, unsupported or not a checkpoint (exit code 3)."""

    exit_code = 3


class NothingToQuantizeError(InputError):
    """A checkpoint without a linear layer that may become 4-bit."""


class MachineError(Nf4Error):
    """The machine cannot do it: disk full, no engine, I/O error (exit code 4)."""

    exit_code = 4


class TransferError(Nf4Error):
    """A Hub refuses something in mid-run, or sends what it did not state.  The input may be good,
    and access or files may be mended there: what is done is kept.

    Args:
        cause: as it was met; it gives the message and the exit code.
    """

    def __init__(self, cause: Nf4Error) -> None:
        super().__init__(str(cause))
        self.exit_code = cause.exit_code


class InterruptedRunError(BaseException):
    """A stop was asked for, by Ctrl-C or a polite kill (exit code 130).

    Like KeyboardInterrupt no Exception, since libraries catch those and go on, or make others of
    them.

    Args:
        leaves: something is left, and the message says what.
    """

    exit_code = 130

    def __init__(self, message: str, leaves: bool = False) -> None:
        super().__init__(message)
        self.leaves = leaves


class UnfinishedRunError(Nf4Error):
    """A run ended early and can be continued.

    Args:
        message: what is left, and how to go on.
        cause: why it ended, which decides the exit code.
    """

    def __init__(self, message: str, cause: Nf4Error | OSError | InterruptedRunError) -> None:
        super().__init__(message)
        self.cause = cause
        self.exit_code = exit_code_of(cause)


class NonFiniteError(ValueError):
    """An engine met a NaN or an infinity; `index` counts elements from the start of its input.

    Internal: the caller knows the tensor and raises an InputError that names it.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"element {index} is not finite")
        self.index = index


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of an error that a user can meet."""
    if isinstance(error, (Nf4Error, InterruptedRunError)):
        return error.exit_code
    return MachineError.exit_code


def describe(error: Nf4Error | OSError | InterruptedRunError) -> str:
    """What an error says to a user."""
    if isinstance(error, UnfinishedRunError):
        return f"{describe(error.cause)}. {error}"
    if isinstance(error, (Nf4Error, InterruptedRunError)):
        return str(error)
    advice = ": free some space" if error.errno == errno.ENOSPC else ""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}{advice}"
