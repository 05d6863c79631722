"""Ask a Hub about models and read their files, through huggingface_hub (0.34 to 2.x)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..checkpoint.types import Origin
from ..checkpoint.untrusted import JsonLimits, is_plain, parse_json
from ..errors import InputError, MachineError
from .errors import endpoint, explained, is_offline
from .retries import first_wait

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 16  # bytes of a body that are handed on at a time: what a broken connection loses
_MAX_FILES = 100_000  # of a repository; the largest models have a few hundred
_LARGEST = 1 << 50  # bytes of a file
_ANSWER = JsonLimits(64_000_000, 2_000_000)  # about a model: some 300 bytes a file

_BUSY_RETRIES = 3  # within one attempt (see retries.py), where the server says that it is busy

Chunks = Iterator[bytes]


class Name(NamedTuple):
    """A model on the Hub as a user writes it, `org/name@revision`.

    Attributes:
        repo: `org/name`.
        revision: a branch, tag or commit; None for the default branch.
    """

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
        sha256: of its bytes, for a file in LFS; None for a file in git itself.
        blob: git's own digest of a file in git itself; None where it is unknown.
    """

    name: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a model, which never changes.

    Attributes:
        name: as the user wrote it.
        commit: 40 hexadecimal digits.
        files: by path in the repository.
    """

    name: Name
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def repo(self) -> str:
        """`org/name`."""
        return self.name.repo

    def origin(self, directory: str = "") -> Origin:
        """Return the origin of the weight files in a directory of the repository."""
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
    """Return the name of a model on the Hub; None for text that cannot be one.

    The Hub is not asked whether the model exists.
    """
    match = _NAME.fullmatch(text)
    if match is None or any(set(part) <= {".", "-"} for part in match["repo"].split("/")):
        return None
    return Name(match["repo"], match["revision"])


def resolve(name: Name) -> Snapshot:
    """Ask the Hub which commit a revision is now, and which files it holds.

    Offline, the user's cache is asked instead.

    Raises:
        InputError: no such model or revision, no access to it, or an answer that no Hub gives.
        UsageError: no valid name.
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
            f"the answer of {endpoint()} about {name} is not that of a Hub "
            f"({type(error).__name__}: {error}): is HF_ENDPOINT right?"
        ) from error
    for path in files:
        _refuse_path(name, path)
    return Snapshot(name, commit, files)


def _ask(name: Name) -> dict[str, Any]:
    """Return the Hub's answer about a model, within limits.

    HfApi.model_info would read an answer of any length into memory.

    Raises:
        InputError: see `resolve`; or the answer is too long.
        MachineError: see `resolve`; or the answer is no JSON object.
    """
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

    revision = "" if name.revision is None else f"/revision/{quote(name.revision, safe='')}"
    url = f"{endpoint()}/api/models/{quote(name.repo)}{revision}?blobs=true"
    with explained(str(name)):
        validate_repo_id(name.repo)
        with _streamed(url, build_hf_headers()) as (response, chunks):
            hf_raise_for_status(response)
            data = first_of(chunks, _ANSWER.nbytes + 1)
    what = f"the answer of {endpoint()} about {name} (is HF_ENDPOINT right?)"
    if len(data) > _ANSWER.nbytes:
        raise InputError(f"{what} has more than {_ANSWER.nbytes:,} bytes")
    try:
        return parse_json(data, what, _ANSWER)
    except InputError as error:  # a proxy's page, which the next attempt may not meet
        raise MachineError(str(error)) from error


def _files(listed: Any) -> Iterator[RemoteFile]:
    """Yield the files in a Hub's list.

    Raises:
        KeyError, TypeError, ValueError: it is no list of files.
    """
    if not isinstance(listed, list) or len(listed) > _MAX_FILES:
        raise ValueError(f"no list of files, or one of more than {_MAX_FILES:,}")
    yield from map(_file, listed)


def _file(listed: dict[str, Any]) -> RemoteFile:
    """Return one entry of a Hub's list as a file; raises what `_files` does."""
    path, size, lfs = listed["rfilename"], listed.get("size") or 0, listed.get("lfs")
    if not isinstance(path, str):
        raise TypeError("a file without a name")
    path.encode()  # JSON can hold a lone surrogate, which no file name can
    if type(size) is not int or not 0 <= size <= _LARGEST:
        raise ValueError(f"{path!r} has the size {size!r}")
    if lfs:
        return RemoteFile(path, size, _string(lfs["sha256"], _SHA256), None)
    blob = listed.get("blobId")
    return RemoteFile(path, size, None, None if blob is None else _string(blob, _COMMIT))


def _string(value: Any, pattern: re.Pattern[str]) -> str:
    """Return a value that is text of a pattern.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:100]!r} is no digest")
    return value


def first_of(chunks: Chunks, most: int) -> bytes:
    """Return the first bytes of a body, at most `most`; the rest is not read."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) >= most:
            break
    return bytes(data[:most])


def _resolve_in_cache(name: Name) -> Snapshot:
    """Return the snapshot of a model as far as it is in the user's cache.

    The cache names files by their digests.

    Raises:
        MachineError: nothing of it is there.
    """
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
    """Raise InputError if the path of a file leads out of its directory."""
    if not all(is_plain(part) and "\\" not in part for part in path.split("/")):
        raise InputError(f"{name} has a file {path!r}, a name that leads out of its directory")


def read_range(snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file on the Hub.

    Raises:
        InputError, MachineError: see `resolve`; or fewer bytes come.
    """
    with open_at(snapshot, file, start, stop) as (position, chunks):
        data = first_of(chunks, stop - position)[start - position :]
    if len(data) != stop - start:
        raise MachineError(
            f"{file.name} of {snapshot.name}: {endpoint()} sent {len(data):,} of "
            f"{stop - start:,} bytes from byte {start:,}: try again"
        )
    return data


@contextmanager
def open_at(
    snapshot: Snapshot, file: RemoteFile, start: int, stop: int | None = None
) -> Iterator[tuple[int, Chunks]]:
    """Open a file on the Hub from byte `start` on, up to `stop` or its end.

    Yields:
        (offset in the file of the first byte that comes, the bytes in pieces).  A server without
        ranges sends the file from its start.

    Raises:
        InputError, MachineError: see `resolve`; or the connection breaks, also in the block.
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
    """Return the offset in the file at which a body begins; `asked` where it does not say."""
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else asked


@contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Chunks]]:
    """Send a GET that follows redirects, and is sent again where the server says that it is busy.

    Yields:
        (response, its body in pieces).
    """
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
            base_wait_time=first_wait(),
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
        base_wait_time=first_wait(),
    )
    try:
        yield response, response.iter_content(_CHUNK)
    finally:
        response.close()


def cached(snapshot: Snapshot, file: RemoteFile) -> Path | None:
    """Return the path of a file in the user's cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(snapshot.repo, file.name, revision=snapshot.commit)
    return Path(path) if isinstance(path, str) else None


def fetch_to_cache(snapshot: Snapshot, file: RemoteFile, again: bool = False) -> Path:
    """Fetch a file to the user's cache, as `hf download` does, and return its path.

    Args:
        again: fetch it although it is in the cache.

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
    """Make the user's cache know which commit the revision is, for work offline.

    A file is asked for by the name of the revision, not by the commit.
    """
    from huggingface_hub import hf_hub_download

    with explained(f"{file.name} of {snapshot.name}"):
        hf_hub_download(snapshot.repo, file.name, revision=snapshot.name.revision)


def blobs_of(repo: str) -> Path:
    """Return where the user's cache keeps a model's files; unfinished ones end in .incomplete."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"


def require_room_in_cache(repo: str, need: int) -> None:
    """Raise MachineError if the disk of the user's cache has fewer than `need` bytes free."""
    directory = blobs_of(repo)
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < need:
        raise MachineError(
            f"{repo} has {need:,} bytes to fetch and the cache in {directory} has {free:,} free: "
            "free some space, set HF_HOME to another disk, or give a bound with --disk, under "
            "which files do not stay"
        )
