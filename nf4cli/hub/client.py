"""What a Hub is asked, through huggingface_hub (0.34 to 2.x), and its failures in our words."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from ..callbacks import Notify, no_notice
from ..checkpoint.types import Origin
from ..checkpoint.untrusted import JsonLimits, is_plain, parse_json
from ..errors import InputError, MachineError, UsageError
from .errors import endpoint, explained, is_offline

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 16  # bytes of a body that are handed on at a time: what a break costs
_MAX_FILES = 100_000  # of a repository; the largest of models have a few hundred
_LARGEST = 1 << 50  # bytes of a file
_ANSWER = JsonLimits(64_000_000, 2_000_000)  # about a model: some 300 bytes a file

_BUSY_RETRIES = 3  # within each of the attempts, where the server says that it is busy
_LONGEST_FIRST_WAIT = 600  # seconds
_ATTEMPTS = 5  # of what fails for a reason that may pass

Chunks = Iterator[bytes]
T = TypeVar("T")


class Name(NamedTuple):
    """A model of the Hub as a user writes it, `org/name@revision`; revision None is the default
    branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit.

    Attributes:
        name: path in the repository, with slashes.
        size: bytes.
        sha256: of its bytes, for a file of LFS; None for one that lies in git itself.
        blob: git's own digest of a file that lies in git.
    """

    name: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a model, which never changes.

    Attributes:
        commit: 40 hexadecimal digits.
        files: by name.
    """

    name: Name
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def repo(self) -> str:
        return self.name.repo

    def origin(self, directory: str = "") -> Origin:
        """Where the weights come from that lie in a directory of it."""
        prefix = f"{directory}/" if directory else ""
        return Origin(
            self.repo,
            self.commit,
            {
                name.removeprefix(prefix): file.sha256
                for name, file in self.files.items()
                if name.startswith(prefix) and name.endswith(".safetensors") and file.sha256
            },
        )


def parse(text: str) -> Name | None:
    """A model of the Hub, None for what cannot be one; whether it exists is another question."""
    match = _NAME.fullmatch(text)
    if match is None or any(set(part) <= {".", "-"} for part in match["repo"].split("/")):
        return None
    return Name(match["repo"], match["revision"])


def resolve(name: Name) -> Snapshot:
    """Ask which commit a revision is now, and what it holds; offline, what the cache knows.

    Raises:
        InputError: no such model or revision, or no access to it.
        MachineError: the Hub cannot be reached.
    """
    if is_offline():
        return _resolve_in_cache(name)
    answer = _ask(name)
    try:
        commit = _string(answer["sha"], _COMMIT)
        files = {file.name: file for file in _files(answer["siblings"])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the answer of {endpoint()} about {name} is none of a Hub's "
            f"({type(error).__name__}: {error}): is HF_ENDPOINT right?"
        ) from error
    for path in files:
        _refuse_path(name, path)
    return Snapshot(name, commit, files)


def _ask(name: Name) -> dict[str, Any]:
    """What a Hub says of a model.  HfApi.model_info would take an answer of any length into memory,
    and of any shape.

    Raises:
        InputError: see `resolve`; it is too long.
        MachineError: see `resolve`; it is no JSON object.
    """
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

    revision = "" if name.revision is None else f"/revision/{quote(name.revision, safe='')}"
    url = f"{endpoint()}/api/models/{quote(name.repo)}{revision}?blobs=true"
    with explained(str(name)):
        validate_repo_id(name.repo)
        with _streamed(url, build_hf_headers()) as (response, chunks):
            hf_raise_for_status(response)
            data = first_of(chunks, _ANSWER.nbytes + 1)
    where = f"the answer of {endpoint()} about {name} (is HF_ENDPOINT right?)"
    if len(data) > _ANSWER.nbytes:
        raise InputError(f"{where} has more than {_ANSWER.nbytes:,} bytes")
    try:
        return parse_json(data, where, _ANSWER)
    except InputError as error:  # a page of somebody on the way, which may be gone the next time
        raise MachineError(str(error)) from error


def _files(listed: Any) -> Iterator[RemoteFile]:
    """The files that a Hub lists.

    Raises:
        KeyError, TypeError, ValueError: it is no such list.
    """
    if not isinstance(listed, list) or len(listed) > _MAX_FILES:
        raise ValueError(f"no list of files, or one of more than {_MAX_FILES:,}")
    yield from map(_file, listed)


def _file(listed: dict[str, Any]) -> RemoteFile:
    """One of them."""
    path, size, lfs = listed["rfilename"], listed.get("size") or 0, listed.get("lfs")
    if not isinstance(path, str):
        raise TypeError("a file without a name")
    path.encode()  # JSON can hold what is no text
    if type(size) is not int or not 0 <= size <= _LARGEST:
        raise ValueError(f"{path!r} has the size {size!r}")
    if lfs:
        return RemoteFile(path, size, _string(lfs["sha256"], _SHA256), None)
    blob = listed.get("blobId")
    return RemoteFile(path, size, None, None if blob is None else _string(blob, _COMMIT))


def _string(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:100]!r} is no digest")
    return value


def first_of(chunks: Chunks, most: int) -> bytes:
    """The first bytes of a body, at most `most`: it may have no end."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) >= most:
            break
    return bytes(data[:most])


def _resolve_in_cache(name: Name) -> Snapshot:
    """A snapshot of what was fetched of it: the cache's files are named by their digests."""
    from huggingface_hub import snapshot_download

    with explained(str(name)):
        root = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest = path.resolve().name if path.is_symlink() else ""
        files[path.relative_to(root).as_posix()] = RemoteFile(
            path.relative_to(root).as_posix(),
            path.stat().st_size,
            digest if re.fullmatch("[0-9a-f]{64}", digest) else None,
            digest if re.fullmatch("[0-9a-f]{40}", digest) else None,
        )
    return Snapshot(name, root.name, files)


def _refuse_path(name: Name, path: str) -> None:
    if not all(is_plain(part) and "\\" not in part for part in path.split("/")):
        raise InputError(f"{name} has a file {path!r}, a name that leads out of its directory")


def read_range(snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file of the Hub, and no others.

    Raises:
        InputError, MachineError: see `resolve`; the answer is shorter.
    """
    with open_at(snapshot, file, start, stop) as (position, chunks):
        found = first_of(chunks, stop - position)[start - position :]
    if len(found) != stop - start:
        raise MachineError(
            f"{file.name} of {snapshot.name}: {endpoint()} sent {len(found):,} of "
            f"{stop - start:,} bytes from byte {start:,}: try again"
        )
    return found


@contextmanager
def open_at(
    snapshot: Snapshot, file: RemoteFile, start: int, stop: int | None = None
) -> Iterator[tuple[int, Chunks]]:
    """A file of the Hub from byte `start` on, up to `stop` or its end.

    Yields:
        (offset of the first byte that comes, the bytes in pieces).  A server that knows no ranges
        sends the file from its start.

    Raises:
        InputError, MachineError: see `resolve`; also where the connection breaks.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(snapshot.repo, file.name, revision=snapshot.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    with (
        explained(f"{file.name} of {snapshot.name}"),
        _streamed(url, headers) as (response, chunks),
    ):
        hf_raise_for_status(response)
        yield _position(response, start), chunks


def _position(response: Any, asked: int) -> int:
    """Where in the file a body begins."""
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else asked


@contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Chunks]]:
    """(response, body in pieces) of a GET that follows redirects and is tried again where the
    server says that it is busy."""
    from huggingface_hub import constants, utils

    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    busy = (429, 500, 502, 503, 504)
    backoff: Any = getattr(utils, "http_stream_backoff", None)
    if backoff is not None:
        # Without retry_on_exceptions: it would begin again in the middle of a body that broke.
        with backoff(
            "GET",
            url,
            headers=headers,
            timeout=timeout,
            retry_on_exceptions=(),
            retry_on_status_codes=busy,
            max_retries=_BUSY_RETRIES,
            base_wait_time=waits(1)[0],
        ) as response:
            yield response, response.iter_bytes(_CHUNK)
        return
    old: Any = utils.http_backoff  # before 1.0, through requests
    response = old(
        "GET",
        url,
        headers=headers,
        timeout=timeout,
        stream=True,
        retry_on_status_codes=busy,
        max_retries=_BUSY_RETRIES,
        base_wait_time=waits(1)[0],
    )
    try:
        yield response, response.iter_content(_CHUNK)
    finally:
        response.close()


def waits(count: int) -> list[float]:
    """Seconds to wait between attempts, each twice the one before; the first is a second, or what
    NF4_HUB_WAIT says.

    Raises:
        UsageError: that is no number.
    """
    text = os.environ.get("NF4_HUB_WAIT", "1")
    try:
        first = float(text)
    except ValueError:
        first = -1.0
    if not 0 <= first <= _LONGEST_FIRST_WAIT:
        raise UsageError(
            f"NF4_HUB_WAIT is {text!r}, expected seconds from 0 to {_LONGEST_FIRST_WAIT}"
        )
    return [first * 2.0**number for number in range(count)]


def persist(
    work: Callable[[], T], notify: Notify = no_notice, stop: threading.Event | None = None
) -> T:
    """Try again, a few times and ever later, what fails for a reason that may pass.

    Args:
        notify: told of every failure that is not the last.
        stop: ends the waiting.

    Raises:
        MachineError: what `work` raised the last time.
    """
    for wait in waits(_ATTEMPTS - 1):
        try:
            return work()
        except MachineError as error:
            if is_offline():
                raise
            notify(f"{error}. The next attempt is in {wait:.0f} s")
            if (stop or threading.Event()).wait(wait):
                raise
    return work()


def cached(snapshot: Snapshot, file: RemoteFile) -> Path | None:
    """Where a file of this commit lies in the user's cache, None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(snapshot.repo, file.name, revision=snapshot.commit)
    return Path(found) if isinstance(found, str) else None


def fetch_to_cache(snapshot: Snapshot, file: RemoteFile, again: bool = False) -> Path:
    """Have a file in the user's cache, as `hf download` would.

    Args:
        again: fetch it although it is there.

    Raises:
        InputError, MachineError: see `resolve`.
    """
    from huggingface_hub import hf_hub_download

    with explained(f"{file.name} of {snapshot.name}"):
        return Path(
            hf_hub_download(
                snapshot.repo, file.name, revision=snapshot.commit, force_download=again
            )
        )


def remember(snapshot: Snapshot, file: RemoteFile) -> None:
    """Have the user's cache know which commit the revision is, for work offline, by asking for a
    file of it under that name."""
    from huggingface_hub import hf_hub_download

    with explained(f"{file.name} of {snapshot.name}"):
        hf_hub_download(snapshot.repo, file.name, revision=snapshot.name.revision)


def blobs_of(repo: str) -> Path:
    """Where the user's cache keeps the bytes of a model; unfinished ones are *.incomplete."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"


def require_room_in_cache(repo: str, need: int) -> None:
    """Raises MachineError when the disk of the user's cache has fewer than `need` bytes free."""
    place = blobs_of(repo)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise MachineError(
            f"{repo} has {need:,} bytes to fetch and the cache in {place} has {free:,} free: free "
            "some space, set HF_HOME to another disk, or give a bound with --disk, under which "
            "files do not stay"
        )
