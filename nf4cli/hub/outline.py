"""A model of a Hub as a directory: its small files whole, of its weight files only the headers.

A weight file is stood in for by a sparse file of its size that holds nothing but the header, read
by a range request.  So what decides about a checkpoint on the disk (discovery.py, make_plan.py,
and the safetensors library, which wants to see the file's length) decides about one on a Hub, with
the same code, and reads no weight.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .. import stopping
from ..checkpoint.discovery import (
    find_shards,
    is_weight_file,
    open_checkpoint,
    sentence_transformers_modules,
)
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import MAX_HEADER
from ..errors import InputError, InterruptedRunError, MachineError
from ..planning.pipeline_plan import is_pipeline
from .client import (
    Chunks,
    RemoteFile,
    Snapshot,
    cached,
    fetch_to_cache,
    open_at,
    persist,
    read_range,
    remember,
)
from .errors import endpoint, is_offline
from .fetching import expected_digest, new_digest

_FIRST_READ = 1 << 16  # bytes: most headers are shorter
_AT_A_TIME = 8  # requests
_LARGEST_SIDE_FILE = 2_000_000_000  # bytes of all files that are no weights: no model has more
_LEFT = (".gitattributes", ".gitignore")


def draw(snapshot: Snapshot, directory: Path, keep: bool = False) -> None:
    """Make the outline of a model, or of a pipeline, in an empty directory.

    Args:
        keep: small files come to the user's cache as well, as `hf download` would have it.

    Raises:
        InputError: it has no safetensors weights, or files that are not as the Hub says.
        MachineError: the Hub cannot be reached.
    """
    files = {name: file for name, file in snapshot.files.items() if _counts(name)}
    sides = [f for name, f in files.items() if not is_weight_file(name) or _is_index(name)]
    if sum(file.size for file in sides) > _LARGEST_SIDE_FILE:
        raise InputError(
            f"{snapshot.name} has files of {sum(file.size for file in sides):,} bytes that are "
            f"no weights, expected at most {_LARGEST_SIDE_FILE:,}: this is no model"
        )
    with _Place(directory) as place:
        _draw(snapshot, place, files, sides, keep)


def _draw(
    snapshot: Snapshot,
    place: _Place,
    files: dict[str, RemoteFile],
    sides: list[RemoteFile],
    keep: bool,
) -> None:
    """Fetch the small files, `sides`, whole, and of `files` the headers of those with weights."""
    directory = place.path
    if keep and not is_offline():
        _each(sides, lambda file: fetch_to_cache(snapshot, file))
        _each(sides[:1], lambda file: remember(snapshot, file))
    _each(sides, lambda file: _fetch_whole(snapshot, file, place))
    modules = {
        path.relative_to(directory).as_posix() for path in sentence_transformers_modules(directory)
    }
    dense = [
        f
        for n, f in files.items()
        if n.endswith(".safetensors") and n.rpartition("/")[0] in modules
    ]
    _each(dense, lambda file: _fetch_whole(snapshot, file, place))
    stand_ins = [f for n, f in files.items() if n.endswith(".safetensors") and f not in dense]
    for file in stand_ins:
        place.create(file.name).close()
    needed = _needed(directory, stand_ins)
    _each(needed, lambda file: _fetch_header(snapshot, file, place))
    for file in stand_ins:
        if file not in needed:
            (directory / file.name).unlink()


class _Place:
    """The directory of an outline, which is left alone once the drawing has ended, however it did.

    Threads may be left behind then that wait for the network; the directory may be removed, and
    nothing appears in it again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._ended = False

    def create(self, name: str) -> BinaryIO:
        """Open a file for writing, anew.

        Raises:
            InterruptedRunError: the drawing has ended.
        """
        place = self.path / name
        with self._lock:
            if self._ended:
                raise InterruptedRunError("interrupted")
            place.parent.mkdir(parents=True, exist_ok=True)
            return place.open("wb")

    def __enter__(self) -> _Place:
        return self

    def __exit__(self, *_: object) -> None:
        with stopping.held_back(), self._lock:
            self._ended = True


def open_outline(snapshot: Snapshot, directory: Path) -> Checkpoint:
    """The checkpoint that an outline is one of."""
    found = open_checkpoint(directory)
    here = {*found.extra_files, *(shard.path.name for shard in found.shards), "config.json"}
    origin = snapshot.origin()
    mine = {s.path.name for s in found.shards}
    sha256 = {name: digest for name, digest in origin.sha256.items() if name in mine}
    return replace(
        found,
        left_files=tuple(sorted(snapshot.files.keys() - here)),
        origin=replace(origin, sha256=sha256),
    )


def names_in(directory: Path) -> list[str]:
    """Names of the files that an outline has."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _counts(name: str) -> bool:
    """Whether a file of a repository may be part of the model."""
    return name not in _LEFT and not any(part.startswith(".") for part in name.split("/")[:-1])


def _is_index(name: str) -> bool:
    return ".safetensors" in name and name.endswith(".json")


def _needed(directory: Path, stand_ins: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The weight files that a loader would take: the model's, or those of a pipeline's parts."""
    pipeline = is_pipeline(directory)
    # A model has weights beside its configuration: where there are none, find_shards says so.
    by_directory: dict[Path, list[RemoteFile]] = {} if pipeline else {directory: []}
    for file in stand_ins:
        place = (directory / file.name).parent
        if place == directory or pipeline:
            by_directory.setdefault(place, []).append(file)
    needed = []
    for place, files in by_directory.items():
        try:
            taken = {path.name for path in find_shards(place)[1]}
        except InputError:
            if place == directory:
                raise
            taken = set()  # whatever lies there, it is no part of the model
        needed += [file for file in files if file.name.rpartition("/")[2] in taken]
    return needed


def _fetch_whole(snapshot: Snapshot, file: RemoteFile, place: _Place) -> None:
    """A small file, from the cache where it is there, compared with what the Hub says of it."""
    local = cached(snapshot, file)
    if local is not None:
        with local.open("rb") as opened:
            complaint = _write(file, place, iter(lambda: opened.read(_FIRST_READ), b""))
    if local is None or (complaint and not is_offline()):
        with open_at(snapshot, file, 0) as (_, chunks):
            complaint = _write(file, place, chunks)
    if complaint:
        raise MachineError(f"{file.name} of {snapshot.name}: {complaint}: try again")


def _write(file: RemoteFile, place: _Place, chunks: Chunks) -> str:
    """Write the bytes of a small file; returns what is wrong with them, "" for nothing."""
    digest, size = new_digest(file), 0
    with place.create(file.name) as out:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if size > file.size:
                return f"more than the {file.size:,} bytes came that {endpoint()} states"
    found, expected = digest.hexdigest(), expected_digest(file)
    if size == file.size and expected in (None, found):
        return ""
    return f"{size:,} bytes with the digest {found} came, expected {file.size:,} with {expected}"


def _fetch_header(snapshot: Snapshot, file: RemoteFile, place: _Place) -> None:
    first = min(file.size, _FIRST_READ)
    data = _read(snapshot, file, 0, first)
    length = 8 + int.from_bytes(data[:8], "little")
    if first < length <= min(file.size, 8 + MAX_HEADER):
        data += _read(snapshot, file, first, length)
    with place.create(file.name) as out:
        out.write(data[: max(8, length)])
        try:
            os.truncate(out.fileno(), file.size)
        except OSError as error:
            raise MachineError(
                f"a sparse file of {file.size:,} bytes cannot be made in {place.path} "
                f"({error.strerror}): choose another place with TMPDIR"
            ) from error


def _read(snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> bytes:
    local = cached(snapshot, file)
    if local is not None and local.stat().st_size == file.size:
        with local.open("rb") as opened:
            opened.seek(start)
            return opened.read(stop - start)
    return read_range(snapshot, file, start, stop)


def _each(files: Iterable[RemoteFile], work: Callable[[RemoteFile], object]) -> None:
    """Several files at a time; the first failure, or Ctrl-C, ends it without waiting for the
    network."""
    waiting, failures = deque(files), list[BaseException]()
    stop, lock = threading.Event(), threading.Lock()

    def work_off() -> None:
        try:
            while not stop.is_set():
                with lock:
                    file = waiting.popleft() if waiting else None
                if file is None:
                    return
                persist(partial(work, file), stop=stop)
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [
        threading.Thread(target=work_off, name=f"nf4-outline-{i}", daemon=True)
        for i in range(min(_AT_A_TIME, len(waiting)))
    ]
    try:
        for thread in threads:
            thread.start()
        stopping.join(threads, until=lambda: failures)
    finally:
        stop.set()
    if failures:
        raise failures[0]
