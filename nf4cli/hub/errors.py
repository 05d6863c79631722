"""Turn the failures of huggingface_hub and its HTTP library into errors that a user understands."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..callbacks import Notify
from ..errors import InputError, MachineError, TransferError, UsageError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
_FORBIDDEN = re.compile(r"HTTP status client error \(40[13] ")
"""A refusal by the storage library, whose errors state the status in their text alone."""


def is_offline() -> bool:
    """Return whether the user forbade huggingface_hub the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """Return the address of the Hub (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise in the block into errors of nf4.

    Args:
        what: was asked for, for messages.

    Raises:
        InputError: it does not exist, or this user may not have it.
        UsageError: the name is not valid, or the token cannot be one.
        MachineError: the network or the Hub failed, or the user forbade the network.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{what} is gated: accept its terms on its page at {endpoint()}, then log in with "
            "`hf auth login` or set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what} is not on {endpoint()}, or is private and your token may not read it: look "
            "at its spelling, and log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{what}: {endpoint()} knows no such branch, tag or commit of it"
        ) from error
    except errors.DisabledRepoError as error:
        raise InputError(f"{what} is disabled on {endpoint()}") from error
    except errors.LocalEntryNotFoundError as error:
        raise (_offline(what) if is_offline() else _unreachable(what, error)) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{what}: {endpoint()} has no such file any more") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{what}: {_first_line(error)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise _offline(what) from error
    except UnicodeEncodeError as error:  # of a header of the request
        raise UsageError(
            f"{what}: the token has a character that no token has "
            f"({error.object[error.start : error.start + 1]!r}): look at HF_TOKEN, or log in again "
            "with `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(what, error) from error
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        raise _failed(what, error) from error


@contextmanager
def in_mid_run() -> Iterator[None]:
    """Turn input errors into TransferError, so that a refusal in mid-run keeps finished work.

    Raises:
        TransferError: in place of an InputError or UsageError in the block.
    """
    try:
        yield
    except (InputError, UsageError) as error:
        raise TransferError(error) from error


def _refused(what: str, error: Any) -> InputError | MachineError:
    """Return the error for an answer of the Hub that has no exception class of its own."""
    status = error.response.status_code if error.response is not None else 0
    message = f"{what}: {endpoint()} answered {status}, {_first_line(error)}"
    if status == 403 and not str(error.response.url).startswith(endpoint()):
        return MachineError(f"{message}, the address of the file may have expired: try again")
    if status in (401, 403):
        return InputError(f"{message}: {_LOG_IN}")
    if 400 <= status < 500 and status not in (408, 412, 416, 429):
        return InputError(message)
    return MachineError(f"{message}: try again later")


def _offline(what: str) -> MachineError:
    return MachineError(
        f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or "
        "fetch it with `hf download` first"
    )


def _failed(what: str, error: BaseException) -> InputError | MachineError:
    """Return the error for a failure of the HTTP library, or of the storage library.

    The storage library reports a refusal in the same way.
    """
    if not _FORBIDDEN.search(str(error)):
        return _unreachable(what, error)
    return InputError(
        f"{what}: the storage of {endpoint()} refused it ({_first_line(error)}): {_LOG_IN}"
    )


def _unreachable(what: str, error: BaseException) -> MachineError:
    return MachineError(
        f"{what}: the connection to {endpoint()} failed ({_first_line(error)}): try again, or "
        "look at HF_ENDPOINT and the network"
    )


def _is_of_the_network(error: Exception) -> bool:
    """Return whether an error comes from the network.

    The HTTP library (requests, httpx, httpx2) or the storage library raises it; or Python, where a
    server asks for a wait of centuries.
    """
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(names & {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}) or (
        isinstance(error, (ConnectionError, OverflowError))
    )


def _first_line(error: BaseException) -> str:
    """Return the first line of a message, without the part of addresses that may be secret."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\?[^\s')]*", "", text).strip().rstrip(".")[:300]


def report_to(notify: Notify) -> None:
    """Show what huggingface_hub logs (failed attempts, waits) as notes, and hide its progress bars.

    Its bars would break ours.

    Raises:
        UsageError: huggingface_hub does not accept a variable of the environment.
    """
    _require_address(os.environ.get("HF_ENDPOINT"))
    try:
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import get_logger
    except ValueError as error:  # it reads them all when it is imported
        raise UsageError(
            f"huggingface_hub does not understand a variable of the environment ({error}): look at "
            "those that begin with HF_"
        ) from error

    disable_progress_bars()
    # By its own function, which adds a handler the first time that it is called.
    logger = get_logger("huggingface_hub")
    logger.handlers = [_NotifyHandler(notify)]
    logger.propagate = False


def _require_address(endpoint: str | None) -> None:
    """Raise UsageError if HF_ENDPOINT is no address: no later attempt could reach it."""
    if endpoint and not re.match(r"https?://[^/\s]+", endpoint):
        raise UsageError(
            f"HF_ENDPOINT is {endpoint!r}, expected an address that begins with http:// or https://"
        )


class _NotifyHandler(logging.Handler):
    """Passes the first line of each warning on."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        self._notify(_first_line(Exception(record.getMessage())))
