"""The errors that a user can meet, each with the exit code that the command line returns for it.

A message names the object, what was found, what was expected and what to do next.  Any error that
is neither an Nf4Error nor an OSError is a bug, and is shown with its traceback.
"""

from __future__ import annotations

import errno


class Nf4Error(Exception):
    """Base class of the errors that the command line shows as a message, without a traceback.

    Attributes:
        exit_code: what the command returns; subclasses and instances may set their own.
    """

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
    """A Hub refuses a request in mid-run, or sends other bytes than it stated.

    The input may be good, and the user may mend access or files on the Hub, so a run that ends
    with this error keeps its finished work.

    Args:
        cause: the error that was met; its message and exit code are taken over.
    """

    def __init__(self, cause: Nf4Error) -> None:
        super().__init__(str(cause))
        self.exit_code = cause.exit_code


class InterruptedRunError(BaseException):
    """The user or the system asked the run to stop: Ctrl-C, SIGTERM, SIGHUP (exit code 130).

    Like KeyboardInterrupt it is no subclass of Exception: libraries catch every Exception, and
    then go on or raise another one.

    Args:
        leaves: whether the run left files behind; the message then says which.
    """

    exit_code = 130

    def __init__(self, message: str, leaves: bool = False) -> None:
        super().__init__(message)
        self.leaves = leaves


class UnfinishedRunError(Nf4Error):
    """A run ended early and can be continued.

    Args:
        message: what the run left behind, and how to continue it.
        cause: why the run ended; its exit code is taken over.
    """

    def __init__(self, message: str, cause: Nf4Error | OSError | InterruptedRunError) -> None:
        super().__init__(message)
        self.cause = cause
        self.exit_code = exit_code_of(cause)


class NonFiniteError(ValueError):
    """An engine met a NaN or an infinity.

    Internal: the caller knows the tensor and raises an InputError that names it.

    Args:
        index: the element, counted from the first one of the engine's input.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"element {index} is not finite")
        self.index = index


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code of an error: its own, or MachineError's for any other exception."""
    if isinstance(error, (Nf4Error, InterruptedRunError)):
        return error.exit_code
    return MachineError.exit_code


def error_with(exit_code: int, message: str) -> Nf4Error:
    """Return the error with an exit code; a MachineError for a code that is none of an input's or a
    command line's."""
    kinds = {kind.exit_code: kind for kind in (InputError, UsageError)}
    return kinds.get(exit_code, MachineError)(message)


def describe(error: Nf4Error | OSError | InterruptedRunError) -> str:
    """Return the text that the command line shows for an error."""
    if isinstance(error, UnfinishedRunError):
        return f"{describe(error.cause)}. {error}"
    if isinstance(error, (Nf4Error, InterruptedRunError)):
        return str(error)
    advice = ": free some space" if error.errno == errno.ENOSPC else ""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}{advice}"
