"""What huggingface_hub and its HTTP library say when they fail, in our words."""

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
"""As the storage library says it, whose errors have no status but in their words."""


def is_offline() -> bool:
    """Whether the user forbade huggingface_hub the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The Hub that is spoken to (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP library raise into errors that a user can meet.

    Args:
        what: that was asked for, as it is named in the message.

    Raises:
        InputError: it does not exist, or is not for this user.
        UsageError: it is no name that a Hub knows.
        MachineError: the network, the Hub or the disk.
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
    """Has what a Hub refuses now not be taken for bad input, which a run leaves nothing of.

    Raises:
        TransferError: in place of an InputError or UsageError.
    """
    try:
        yield
    except (InputError, UsageError) as error:
        raise TransferError(error) from error


def _refused(what: str, error: Any) -> InputError | MachineError:
    """An answer of the Hub that is none of those with a name of their own."""
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
    """What the HTTP library says, or that of the storage, which also says so what was refused."""
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
    """Whether it is raised by the HTTP library that huggingface_hub uses: requests, httpx, httpx2,
    or the transfer library of its storage; or by Python, of a wait of centuries that a server asks
    for."""
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(names & {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}) or (
        isinstance(error, (ConnectionError, OverflowError))
    )


def _first_line(error: BaseException) -> str:
    """The first line of a message, without what signed addresses carry behind a question mark."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\?[^\s')]*", "", text).strip().rstrip(".")[:300]


def report_to(notify: Notify) -> None:
    """Have what huggingface_hub logs (attempts that failed, waits) told like our own notes, and
    its progress bars left out: they would tear ours.

    Raises:
        UsageError: a variable of the environment is not what huggingface_hub takes.
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
    logger = get_logger(
        "huggingface_hub"
    )  # by its own function: that adds a handler, the first time
    logger.handlers = [_Told(notify)]
    logger.propagate = False


def _require_address(endpoint: str | None) -> None:
    """What no request could be sent to is no trouble of the network, which may pass."""
    if endpoint and not re.match(r"https?://[^/\s]+", endpoint):
        raise UsageError(
            f"HF_ENDPOINT is {endpoint!r}, expected an address that begins with http:// or https://"
        )


class _Told(logging.Handler):
    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        self._notify(_first_line(Exception(record.getMessage())))
