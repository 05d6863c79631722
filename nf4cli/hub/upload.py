"""What huggingface_hub commits of one file, with its bytes counted on their way, and what it says
when it fails."""

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
"""Bytes of a file that is none of LFS; the Hub takes up to 10 MB."""

_NO_XET = "A server that has no Xet storage needs HF_HUB_DISABLE_XET=1"

Sent = Callable[[int], None]
"""Told of bytes of a file that are on the Hub, from any thread."""


class _Counted(io.BufferedReader):
    """A file that tells of its bytes as they are read for the first time."""

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
    """What huggingface_hub commits, for a file whose digest is known.

    Its own constructor would read the whole file for the digest (before 1.0), and wants a file
    where an earlier process has sent the bytes and removed it.  So it is made without bytes, and
    told afterwards what they are.  The names with an underscore are its private ones, the same
    from 0.34 to 2.x; nothing else of nf4 touches them, and tests/hub/test_hub_publish.py commits
    with both ends of that range.

    Args:
        path: None where an earlier process sent the bytes.
        sample: its first 512 bytes.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    class Watched(CommitOperationAdd):
        """A file whose bytes are counted as they are read, those of a second attempt not again."""

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
    """Where it is told how far a file is, if it is one of `addition`'s; a model card's is not."""
    found: Position = getattr(operation, "count", lambda _: None)
    return found


def is_ignored(operation: CommitOperationAdd) -> bool:
    """Whether the repository's .gitignore leaves it out, of which huggingface_hub is silent."""
    return bool(operation._should_ignore)


def is_stored(operation: CommitOperationAdd) -> bool:
    """Whether its bytes are on the Hub, by LFS; a small file lies in git and has none there."""
    return operation._upload_mode == "lfs"


def hold(operation: CommitOperationAdd, path: Path, sha256: str) -> str:
    """Take a small file into memory, for the commit to carry; returns git's digest of it.

    Raises:
        InputError: it is not small, or not the file that it was.
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
    """Git's digest of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file's bytes, hexadecimal."""
    return digests_of_file(path, {"sha256"})[1]["sha256"]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Like `explained`, also for what huggingface_hub and its storage library raise of Python's
    own kinds where the server's answer is none that they know.

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
    """Whether uploads go to a storage that another Hub than the known one may not have."""
    from huggingface_hub import constants

    there = find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET
    return there and "HF_ENDPOINT" in os.environ


def response_of(error: BaseException) -> Any:
    """The answer of a server that an error of ours was made of, None where there was none."""
    cause: Any = error
    while cause is not None:
        if getattr(cause, "response", None) is not None:
            return cause.response
        cause = cause.__cause__
    return None


def retry_after(error: BaseException, most: float) -> float:
    """Seconds that the server wants us to wait before the next attempt, at most `most`."""
    response = response_of(error)
    if response is None:
        return 0.0
    text = str(response.headers.get("Retry-After", "")).strip()
    return min(float(text), most) if text.isdecimal() else 0.0
