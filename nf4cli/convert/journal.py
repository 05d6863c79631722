"""Keep the journal of a run: what is finished, so that a run that was stopped can be continued.

The journal is a file of lines, each with a checksum.  The first line is the header (see
`resume.header`); the others name weights that are written, source files that are read to their end,
and output files that a Hub has.  A line about bytes is written after the bytes are on the disk, and
it is checked again before it counts (resume.py).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.file_io import Identity, identity_of, is_settled, sync
from ..checkpoint.types import FileDigests, Shard
from ..output.manifest import Result, TensorError

VERSION = 1
"""Of the journal's format; a run with another version cannot be continued."""
SYNC_EVERY = 0.25  # seconds between two syncs

Json = dict[str, Any]


@dataclass(slots=True)
class Part:
    """What a journal says of one checkpoint (a pipeline has several).

    Attributes:
        weights: (result, digests of its output tensors by key), by weight.
        files: digests of the source files that were read to their end, by name.
        identities: of the source files when the run began, by name; only those that every later
            change of the file changes (`is_settled`).
        uploads: the output files that a Hub has, by name; the disk may not have them any more.
    """

    weights: dict[str, tuple[Result, dict[str, str]]] = field(default_factory=dict)
    files: dict[str, FileDigests] = field(default_factory=dict)
    identities: dict[str, Identity] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Upload:
    """An output file that was uploaded to a Hub.

    Attributes:
        digest: of its bytes, in the run's algorithm.
        size: bytes.
        sha256: of its bytes, hexadecimal.
        sample: its first 512 bytes, which a Hub asks for.
    """

    digest: str
    size: int
    sha256: str
    sample: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal holds.

    Attributes:
        header: its first line as JSON; None where there is none, or it is damaged.
        parts: by name; "" for a checkpoint alone.
        damaged: whether the first line is not as it was written.
    """

    header: Json | None
    parts: Mapping[str, Part]
    damaged: bool

    @property
    def finished(self) -> int:
        """Number of finished weights of all parts."""
        return sum(len(part.weights) for part in self.parts.values())


def read(fd: int) -> Contents:
    """Read an open journal.

    A line that is not as it was written is left out, so that its work is done again.
    """
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        lines = file.read().split(b"\n")
    entries = [_parse(line) for line in lines[:-1]]
    parts: dict[str, Part] = {}
    for entry in entries[1:]:
        if entry is not None:
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                _apply(entry, parts)
    header = entries[0] if entries else None
    return Contents(header, parts, bool(entries) and header is None)


def _whole_lines(fd: int) -> int:
    """Return the bytes up to the end of the last whole line."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read().rfind(b"\n") + 1


def _line(entry: Json) -> bytes:
    """Return the line of an entry: checksum, space, JSON."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _parse(line: bytes) -> Json | None:
    """Return the entry of a line; None where it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != _checksum(text):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _checksum(text: bytes) -> bytes:
    import xxhash

    return xxhash.xxh3_64_hexdigest(text).encode()


def _apply(entry: Json, parts: dict[str, Part]) -> None:
    """Add what an entry says to its part.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a field is missing or of another kind.
    """
    part = parts.setdefault(entry["part"], Part())
    if "weight" in entry:
        error = entry["error"]
        result = Result(
            entry["nested_offset"], TensorError(**error) if error else None, dict(entry["sources"])
        )
        part.weights[entry["weight"]] = result, dict(entry["outputs"])
    elif "lost" in entry:
        for name in entry["lost"]:
            part.uploads.pop(name, None)
    elif "uploaded" in entry:
        sample = bytes.fromhex(entry["sample"])
        part.uploads[entry["uploaded"]] = Upload(
            str(entry["digest"]), int(entry["size"]), str(entry["sha256"]), sample
        )
    elif "file" in entry:
        part.files[entry["file"]] = FileDigests(entry["digest"], dict(entry["tensors"]))
    else:
        identities = entry["identities"].items()
        part.identities = {name: _identity(values) for name, values in identities}


def _identity(values: list[Any]) -> Identity:
    device, inode, size, modified, changed = values
    return (int(device), int(inode), int(size), int(modified), int(changed))


class Journal:
    """A journal that is being written; every method but `close` is thread-safe.

    A thread of its own waits for the disk, so that no worker has to.

    Args:
        fd: the file, open for reading and writing; not closed here.
        fsync: sync the bytes that a line is about before the line is written, and then the line.
    """

    def __init__(self, fd: int, fsync: bool) -> None:
        self._fd = fd
        self._fsync = fsync
        self._changed = threading.Condition()
        self._lines: list[bytes] = []
        self._unsynced: set[Path] = set()
        self._added = self._written = 0  # lines
        self._closing = False
        self._awaited = False  # a thread waits until its line is written
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="nf4-journal", daemon=True)
        os.ftruncate(fd, _whole_lines(fd))  # a torn line would spoil the next one
        os.lseek(fd, 0, os.SEEK_END)

    def start(self) -> None:
        """Start the thread that writes the lines."""
        self._thread.start()

    def restart(self, header: Json) -> None:
        """Forget everything and begin with `header`."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._append(_line(header))

    def identities(self, part: str, shards: Iterable[Shard]) -> None:
        """Record the identities of the source files, before any of their tensors is read."""
        now = time.time_ns()
        settled = {
            shard.path.name: shard.identity
            for shard in shards
            if is_settled(shard.identity, now) and identity_of(shard.path.stat()) == shard.identity
        }
        self._add({"part": part, "identities": settled}, None)

    def weight(
        self, part: str, name: str, result: Result, outputs: Mapping[str, str],
        path: Path | None,
    ) -> None:  # fmt: skip
        """Record that a weight is written whole.

        Args:
            outputs: digests of its output tensors, by key.
            path: of its file; None for one that is not on this disk.

        Raises:
            OSError: an earlier line could not be written.
        """
        self._add(
            {
                "part": part,
                "weight": name,
                "nested_offset": result.nested_offset,
                "error": asdict(result.error) if result.error else None,
                "sources": dict(result.sources),
                "outputs": dict(outputs),
            },
            path,
        )

    def source_file(self, part: str, name: str, digests: FileDigests) -> None:
        """Record that a source file is read to its end.

        Raises:
            OSError: see `weight`.
        """
        self._add({"part": part, "file": name, **asdict(digests)}, None)

    def uploaded(self, part: str, name: str, upload: Upload) -> None:
        """Record that a Hub has an output file, and wait until that line is on the disk.

        Then the file itself may be removed.

        Raises:
            OSError: see `weight`.
        """
        fields = {**asdict(upload), "sample": upload.sample.hex()}
        number = self._add({"part": part, "uploaded": name, **fields}, None)
        with self._changed:
            self._awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._written >= number or self._error)
            if self._error is not None:
                raise self._error

    def lost(self, part: str, names: Iterable[str]) -> None:
        """Record that a Hub does not have these output files any more.

        Raises:
            OSError: see `weight`.
        """
        self._add({"part": part, "lost": list(names)}, None)

    def close(self) -> None:
        """Write the lines that are left, and end the thread; `require_good` tells of failures."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def require_good(self) -> None:
        """Raise the OSError of a write or sync that failed; call it after `close`.

        The system reports such a failure once: a later sync of the same file may succeed.
        """
        if self._error is not None:
            raise self._error

    def _add(self, entry: Json, path: Path | None) -> int:
        """Queue a line, and return its number, from 1.

        Args:
            path: of the file to sync before the line is written; None for none.

        Raises:
            OSError: an earlier line could not be written.
        """
        line = _line(entry)
        with self._changed:
            if self._error is not None:
                raise self._error
            self._lines.append(line)
            self._added += 1
            if path is not None:
                self._unsynced.add(path)
            self._changed.notify_all()
            return self._added

    def _run(self) -> None:
        """Write lines as they come, until `close`; keep the first error."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._lines or self._closing)
                    self._changed.wait_for(lambda: self._closing or self._awaited, SYNC_EVERY)
                    self._awaited = False
                    lines, self._lines = self._lines, []
                    unsynced, self._unsynced = self._unsynced, set()
                    closing = self._closing
                if self._fsync and not closing:  # after the end, digests show what is lost
                    for path in unsynced:
                        sync(path)
                if lines:
                    self._append(b"".join(lines))
                with self._changed:
                    self._written += len(lines)
                    self._changed.notify_all()
                if closing:
                    return
        except OSError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _append(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
        if self._fsync and not self._closing:
            os.fsync(self._fd)
