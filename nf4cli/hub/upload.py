"""Upload one file through huggingface_hub: count its bytes on the way, and explain failures."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.digest import digests_of_file
from ..checkpoint.untrusted import read_start
from ..errors import InputError, MachineError
from .errors import endpoint, explained
from .xet_progress import Position

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

MAX_IN_GIT = 32_000_000
"""Largest file in git itself, not in LFS, in bytes; the Hub takes up to 10 MB."""

_NO_XET = "A server that has no Xet storage needs HF_HUB_DISABLE_XET=1"

Sent = Callable[[int], None]
"""Told how many more bytes are on the Hub, from any thread."""


class _Counted(io.BufferedReader):
    """A file that reports how far it was read.

    Args:
        count: told the position in the file after each read, in bytes.
    """

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._count(self.tell())
        return data


def addition(
    name: str, path: Path | None, size: int, sample: bytes, sha256: str, sent: Sent
) -> CommitOperationAdd:
    """Return huggingface_hub's operation for a file whose digest is known.

    Its own constructor would read the whole file for the digest (before 1.0), and needs the file
    even where an earlier process has uploaded and removed it.  So the operation is made without
    bytes, and given size, digest and path afterwards.  The names with an underscore are private to
    huggingface_hub, and the same from 0.34 to 2.x; no other module of nf4 uses them, and
    tests/hub/test_hub_publish.py commits with both ends of that range.

    Args:
        name: path in the repository, with slashes.
        path: of the file; None where an earlier process uploaded the bytes.
        size: bytes.
        sample: its first 512 bytes.
        sha256: of its bytes, hexadecimal.
        sent: told the bytes that are uploaded.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    class Watched(CommitOperationAdd):
        """An operation that counts bytes as they are read; a second attempt counts none again."""

        read = 0

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            if not isinstance(self.path_or_fileobj, str):
                with super().as_file() as file:
                    yield file
                return
            with _Counted(Path(self.path_or_fileobj), self.count) as file:
                yield file

        def count(self, position: int) -> None:
            if position > self.read:
                sent(position - self.read)
                self.read = position

    operation = Watched(path_in_repo=name, path_or_fileobj=b"")
    operation.upload_info = UploadInfo(size=size, sample=sample, sha256=bytes.fromhex(sha256))
    if path is not None:
        operation.path_or_fileobj = str(path)
    else:
        operation._upload_mode = "lfs"
        operation._should_ignore = False
        operation._is_uploaded = True
    return operation


def counter_of(operation: CommitOperationAdd) -> Position:
    """Return what takes an upload's position in bytes; for a model card, what ignores it."""
    count: Position = getattr(operation, "count", lambda _: None)
    return count


def is_ignored(operation: CommitOperationAdd) -> bool:
    """Return whether the repository's .gitignore leaves a file out.

    huggingface_hub leaves it out without an error.
    """
    return bool(operation._should_ignore)


def is_stored(operation: CommitOperationAdd) -> bool:
    """Return whether the Hub has a file's bytes in LFS; a small file is sent with the commit."""
    return operation._upload_mode == "lfs"


def hold(operation: CommitOperationAdd, path: Path, sha256: str) -> str:
    """Read a small file into memory, to be sent with the commit, and return git's digest of it.

    Raises:
        InputError: the file is not small, or has changed.
    """
    data, size, _ = read_start(path, MAX_IN_GIT)
    if size > MAX_IN_GIT:
        raise InputError(
            f"{path} has {size:,} bytes, and {endpoint()} wants it in git itself, not in LFS: "
            "name its kind in the repository's .gitattributes"
        )
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path} changed while it was sent: let nobody write there, run again")
    operation.path_or_fileobj = data
    return blob_of(data)


def blob_of(data: bytes) -> str:
    """Return git's digest of a file, hexadecimal."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    return digests_of_file(path, {"sha256"})[1]["sha256"]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn errors within the block into errors of nf4, as `explained` does, and two more kinds.

    huggingface_hub and its storage library raise ValueError and RuntimeError where they do not
    understand a server's answer.

    Args:
        what: is sent or asked for, for messages.

    Raises:
        InputError, MachineError, UsageError: see `explained`.
    """
    try:
        with explained(what):
            yield
    except MachineError as error:
        if _sends_to_xet():
            raise MachineError(f"{error}. {_NO_XET}") from error
        raise
    except (ValueError, RuntimeError) as error:
        text = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        if "metadata" in text.lower():
            raise InputError(f"{what}: README.md is not what the Hub takes: {error}") from error
        raise MachineError(
            f"{what}: {endpoint()} was not understood ({text[:300]}): try again. {_NO_XET}"
        ) from error


def _sends_to_xet() -> bool:
    """Return whether uploads use Xet storage on a Hub of the user's choice, which may have none."""
    from huggingface_hub import constants

    used = find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET
    return used and "HF_ENDPOINT" in os.environ


def response_of(error: BaseException) -> Any:
    """Return the server's response that an error comes from; None where there was none."""
    cause: Any = error
    while cause is not None:
        if getattr(cause, "response", None) is not None:
            return cause.response
        cause = cause.__cause__
    return None


def retry_after(error: BaseException, most: float) -> float:
    """Return the seconds that the server asks to wait before the next attempt, at most `most`."""
    response = response_of(error)
    if response is None:
        return 0.0
    text = str(response.headers.get("Retry-After", "")).strip()
    return min(float(text), most) if text.isdecimal() else 0.0
