"""Make the outline of a model on a Hub: a directory of its small files, and its weights' headers.

In place of a weight file stands a sparse file of its size that holds the header alone, read by a
range request.  So the code that plans for a checkpoint on the disk (discovery.py, make_plan.py, and
the safetensors library, which checks the file's length) plans for one on a Hub, and reads no
weight.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .. import stopping
from ..checkpoint.discovery import (
    MANIFEST,
    PIPELINE_RECORD,
    find_shards,
    is_weight_file,
    open_checkpoint,
    other_files,
    sentence_transformers_modules,
)
from ..checkpoint.model_files import is_decoder, matches, may_be_part, never_kind
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import MAX_HEADER, RECORD, read_json
from ..errors import InputError, InterruptedRunError, MachineError
from ..planning.pipeline_plan import is_pipeline
from ..threads import each
from .client import (
    Chunks,
    RemoteFile,
    Snapshot,
    cached,
    fetch_to_cache,
    open_at,
    read_range,
    remember,
)
from .errors import endpoint, is_offline
from .fetching import expected_digest, new_digest
from .retries import persist

_FIRST_READ = 1 << 16  # bytes: most headers are shorter
_AT_A_TIME = 8  # requests
_LARGEST_SIDE_FILE = 2_000_000_000  # bytes of all files without weights: no model has more
_LEFT = (".gitattributes", ".gitignore")


def draw(
    snapshot: Snapshot,
    directory: Path,
    keep: bool = False,
    copy: Collection[str] = (),
    headers_only: bool = False,
) -> None:
    """Make the outline of a model, or of a pipeline, in an empty directory.

    Args:
        keep: fetch the small files to the user's cache as well, as `hf download` does.
        copy: patterns of files that an output copies, which are fetched whole.
        headers_only: of the parts beside the model fetch headers alone, for a plan.

    Raises:
        InputError: it has no safetensors weights, or its other files are too large.
        MachineError: the Hub cannot be reached, or a file is not as the Hub states.
        InterruptedRunError: a stop was asked for.
    """
    files = {name: file for name, file in snapshot.files.items() if _counts(name)}
    # An earlier version may have copied what is never copied now: its output is still verified.
    is_output = any(name in files for name in (MANIFEST, PIPELINE_RECORD))
    sides = [
        file
        for name, file in files.items()
        if (not is_weight_file(name) or _is_index(name) or is_decoder(name))
        and (is_output or not never_kind(name))
    ]
    sides += [
        file
        for name, file in files.items()
        if file not in sides
        and not never_kind(name)
        and not name.endswith(".safetensors")
        and any(matches(pattern, name) for pattern in copy)
    ]
    _require_small(snapshot, sides, "that are no weights")
    with _Place(directory) as place:
        _draw(snapshot, place, files, sides, keep)
        _fetch_parts(snapshot, place, files, copy, None if headers_only else keep)


def _require_small(snapshot: Snapshot, files: Iterable[RemoteFile], what: str) -> None:
    """Raise InputError if files that are fetched whole are too large."""
    total = sum(file.size for file in files)
    if total > _LARGEST_SIDE_FILE:
        raise InputError(
            f"{snapshot.name} has files of {total:,} bytes {what}, expected at most "
            f"{_LARGEST_SIDE_FILE:,}: this is no model"
        )


def _draw(
    snapshot: Snapshot,
    place: _Place,
    files: dict[str, RemoteFile],
    sides: list[RemoteFile],
    keep: bool,
) -> None:
    """Fetch the small files `sides` whole, and the headers of the weight files among `files`."""
    directory = place.path
    if keep and not is_offline():
        _each(sides, lambda file: fetch_to_cache(snapshot, file))
        _each(sides[:1], lambda file: remember(snapshot, file))
    _each(sides, lambda file: _fetch_whole(snapshot, file, place))
    recorded = _recorded_copies(directory)
    pickles = [f for n, f in files.items() if n in recorded and f not in sides]
    pickles = [file for file in pickles if not file.name.endswith(".safetensors")]
    _each(pickles, lambda file: _fetch_whole(snapshot, file, place))
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


def _fetch_parts(
    snapshot: Snapshot,
    place: _Place,
    files: dict[str, RemoteFile],
    copy: Collection[str],
    keep: bool | None,
) -> None:
    """Fetch the safetensors files that an output copies: parts beside a model, and those of --copy.

    Their headers tell whether they hold the model's own weights once more.

    Args:
        place: the outline, with everything else.
        keep: see `draw`; None for headers alone.

    Raises:
        InputError: they are too large for a run within a bound on the disk.
    """
    directory = place.path
    asked = {n for n in files if any(matches(pattern, n) for pattern in copy) and not never_kind(n)}
    there, pipeline = {*names_in(directory)}, is_pipeline(directory)
    candidates = [
        file
        for name, file in files.items()
        if name.endswith(".safetensors")
        and name not in there
        and (name in asked or _may_be_part(name, pipeline))
    ]
    if not candidates:
        return
    _each(candidates, lambda file: _fetch_header(snapshot, file, place))
    copied = asked | _copied_in(directory)
    parts = [file for file in candidates if file.name in copied]
    for file in candidates:
        if file not in parts:
            (directory / file.name).unlink()
    if keep is None:
        return
    if keep and not is_offline():
        _each(parts, lambda file: fetch_to_cache(snapshot, file))
    elif not keep and sum(file.size for file in parts) > _LARGEST_SIDE_FILE:
        names = ", ".join(file.name for file in parts[:5])
        raise InputError(
            f"{snapshot.name} has parts of {sum(file.size for file in parts):,} bytes beside the "
            f"model ({names}), which are copied whole and do not go with --disk: leave it out"
        )
    _each(parts, lambda file: _fetch_whole(snapshot, file, place))


def _may_be_part(name: str, pipeline: bool) -> bool:
    """Return whether a file may be a part, by its name; a pipeline's are those of a component."""
    if not pipeline:
        return may_be_part(name)
    component, _, rest = name.partition("/")
    return bool(component and rest) and may_be_part(rest)


def _copied_in(directory: Path) -> set[str]:
    """Return the files that an output would copy; of a pipeline, those in its directories."""
    if not is_pipeline(directory):
        return _copied_of_one(directory)
    return {
        f"{part.name}/{name}"
        for part in directory.iterdir()
        if part.is_dir()
        for name in _copied_of_one(part)
    }


def _copied_of_one(directory: Path) -> set[str]:
    try:
        index, shards = find_shards(directory)
    except InputError:
        return set()
    return {*other_files(directory, shards, index)[0]}


def _recorded_copies(directory: Path) -> set[str]:
    """Return the files that the manifest or the record of an output lists, if there is one."""
    names: set[str] = set()
    damaged = (InputError, AttributeError, KeyError, TypeError)  # whoever verifies it says so
    for path in (*directory.glob(MANIFEST), *directory.glob(f"*/{MANIFEST}")):
        with suppress(*damaged):
            listed = read_json(path, RECORD).get("output", {}).get("files", [])
            part = path.parent.relative_to(directory)
            names.update((part / str(file["name"])).as_posix() for file in listed)
    with suppress(*damaged):
        names.update(
            str(f["name"]) for f in read_json(directory / PIPELINE_RECORD, RECORD)["files"]
        )
    return names


class _Place:
    """The directory of an outline, in which no file appears after the block has ended.

    Threads that wait for the network may be left behind then, and the directory may be removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._ended = False

    def create(self, name: str) -> BinaryIO:
        """Create or empty a file, and open it for writing.

        Raises:
            InterruptedRunError: the block has ended.
        """
        path = self.path / name
        with self._lock:
            if self._ended:
                raise InterruptedRunError("interrupted")
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb")

    def __enter__(self) -> _Place:
        return self

    def __exit__(self, *_: object) -> None:
        with stopping.held_back(), self._lock:
            self._ended = True


def open_outline(snapshot: Snapshot, directory: Path) -> Checkpoint:
    """Open an outline as the checkpoint that it stands for, with its origin on the Hub."""
    checkpoint = open_checkpoint(directory)
    shards = {shard.path.name for shard in checkpoint.shards}
    used = {*checkpoint.extra_files, *shards, "config.json"}
    origin = snapshot.origin()
    sha256 = {name: digest for name, digest in origin.sha256.items() if name in shards}
    return replace(
        checkpoint,
        left_files=tuple(sorted(snapshot.files.keys() - used)),
        origin=replace(origin, sha256=sha256),
    )


def names_in(directory: Path) -> list[str]:
    """Return the paths of the files of an outline, sorted."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _counts(name: str) -> bool:
    """Return whether a file of a repository may be part of the model."""
    return name not in _LEFT and not any(part.startswith(".") for part in name.split("/")[:-1])


def _is_index(name: str) -> bool:
    return ".safetensors" in name and name.endswith(".json")


def _needed(directory: Path, stand_ins: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Return the weight files that a loader takes: a model's, or those of a pipeline's components.

    Raises:
        InputError: a model has none.
    """
    pipeline = is_pipeline(directory)
    # A model has weights beside its configuration: find_shards raises where there are none.
    by_directory: dict[Path, list[RemoteFile]] = {} if pipeline else {directory: []}
    for file in stand_ins:
        parent = (directory / file.name).parent
        if parent == directory or pipeline:
            by_directory.setdefault(parent, []).append(file)
    needed = []
    for parent, files in by_directory.items():
        try:
            loaded = {path.name for path in find_shards(parent)[1]}
        except InputError:
            if parent == directory:
                raise
            loaded = set()  # its files are no part of the model
        needed += [file for file in files if file.name.rpartition("/")[2] in loaded]
    return needed


def _fetch_whole(snapshot: Snapshot, file: RemoteFile, place: _Place) -> None:
    """Copy a small file from the cache, or fetch it, and check its size and digest.

    Raises:
        MachineError: it is not as the Hub states.
    """
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
    """Write the bytes of a small file, and return what is wrong with them; "" for nothing."""
    digest, size = new_digest(file), 0
    with place.create(file.name) as out:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if size > file.size:
                return f"more than the {file.size:,} bytes came that {endpoint()} states"
    actual, expected = digest.hexdigest(), expected_digest(file)
    if size == file.size and expected in (None, actual):
        return ""
    return f"{size:,} bytes with the digest {actual} came, expected {file.size:,} with {expected}"


def _fetch_header(snapshot: Snapshot, file: RemoteFile, place: _Place) -> None:
    """Create a sparse file of a weight file's size that holds its header.

    Raises:
        MachineError: the file system has no sparse files of that size.
    """
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
    """Return bytes [start, stop) of a file, from the cache or from the Hub."""
    local = cached(snapshot, file)
    if local is not None and local.stat().st_size == file.size:
        with local.open("rb") as opened:
            opened.seek(start)
            return opened.read(stop - start)
    return read_range(snapshot, file, start, stop)


def _each(files: Sequence[RemoteFile], work: Callable[[RemoteFile], object]) -> None:
    """Call `work` for several files at a time, again where the Hub may be busy.

    The first failure, or a stop, ends it without waiting for the network.
    """

    def persistently(file: RemoteFile, stop: threading.Event) -> None:
        persist(partial(work, file), stop=stop)

    each(files, persistently, min(_AT_A_TIME, len(files)), leave_behind=True)
