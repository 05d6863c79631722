"""The directory that a run works in, beside its output: found again, locked, committed.

`.NAME.partial` holds `files`, which becomes the output in one rename, and the journal.  The journal
is also the lock: the system releases it when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import journal
from .errors import InputError, Nf4Error, UnfinishedRunError, UsageError
from .fileio import sync
from .journal import Contents, Journal, Json
from .limits import refuse_place, workspace_of
from .source import MANIFEST, PIPELINE_RECORD


class Workspace:
    """A run's own place.  Leaving it in good order makes `directory` the output.

    Args:
        output: must not exist, or be an empty directory.
        source: root of what is read, which `output` must not lie in; its directory for a file.
        header: what is being made of what; a run with another one is not continued.  None for
            a run that finishes no weight before its end, and so never can be.
        total: weights of the whole output, for messages.
        resume: continue what an earlier run left; without it such a thing is an error.
        fsync: see Journal; at the end, wait for everything.

    Attributes:
        output: absolute.
        root: the workspace.
        directory: what will be the output; empty, or with an earlier run's files.
        earlier: the journal of an earlier run; empty for a new one.
        complete: an output is there, which a run that is resumed may be content with.
    """

    earlier: Contents
    journal: Journal
    complete: bool

    def __init__(
        self,
        output: Path,
        source: tuple[Path, bool],
        header: Json | None = None,
        total: int = 0,
        *,
        fsync: bool,
        resume: bool = False,
    ) -> None:
        self.output = output.absolute()
        self._source = source
        self._header = header or {}
        self._total = total
        self._resume = resume
        self._fsync = fsync
        self.root = workspace_of(output)
        self.directory = self.root / "files"

    def __enter__(self) -> Workspace:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._lock()
        try:
            self.earlier = journal.read(self._fd)
            self.complete = self._is_complete()
            if not self.complete:
                refuse_place(self._source[0], self.output, self._source[1])
                if self.earlier.finished and self.directory.is_dir():
                    self._require_the_same()
                else:
                    self._begin()
            self.journal = Journal(self._fd, self._fsync)
            if not self.earlier.finished and not self.complete:
                self.journal.restart(self._header)
            self.journal.start()
        except BaseException:
            if not journal.read(self._fd).finished:
                self._remove()
            os.close(self._fd)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.journal.close()
            if error is not None:
                self._leave(error)
                return
            if not self.complete:
                try:
                    self._commit()
                except BaseException as late:
                    self._leave(late)
                    raise
            self._remove()
        finally:
            os.close(self._fd)

    def _lock(self) -> int:
        while True:
            self.root.mkdir(exist_ok=True)
            status = self.root.lstat()
            if self.root.is_symlink() or status.st_uid != os.geteuid():
                raise UsageError(
                    f"{self.root}, where the work on {self.output} would lie, is a link or "
                    "somebody else's: remove it, or choose another output"
                )
            path = self.root / "journal"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # another run, which has just finished, removed the directory
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(fd)
                raise UsageError(
                    f"another run is writing {self.output}: wait for its end, or choose another "
                    "output"
                ) from error
            except BaseException:
                os.close(fd)
                raise
            if path.exists() and os.path.samestat(path.stat(), os.fstat(fd)):
                return fd
            os.close(fd)  # that run has just finished

    def _is_complete(self) -> bool:
        """Whether an output of ours is there, and nothing else was begun."""
        return (
            self._resume
            and not self.directory.exists()
            and any((self.output / name).is_file() for name in (MANIFEST, PIPELINE_RECORD))
        )

    def _begin(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.earlier = Contents(None, {}, False)
        self.directory.mkdir()

    def _require_the_same(self) -> None:
        unfinished = (
            f"an unfinished run lies in {self.root} ({self.earlier.finished:,} weights done)"
        )
        if not self._resume:
            raise UsageError(
                f"{unfinished}: continue it with the same command and --resume, or remove it: "
                f"rm -r {self.root}"
            )
        if self.earlier.damaged:
            raise UsageError(
                f"{unfinished}, but its journal is damaged: remove it and start again: "
                f"rm -r {self.root}"
            )
        differences = list(dict.fromkeys(_differences(self.earlier.header, self._header)))
        if differences:
            raise UsageError(
                f"{unfinished}, of something else: {'; '.join(differences[:8])}. Give the same "
                f"source and options again, or remove it: rm -r {self.root}"
            )

    def _commit(self) -> None:
        if self._fsync:
            for path in (*self.directory.rglob("*"), self.directory):
                sync(path)
        self.directory.rename(self.output)
        if self._fsync:
            sync(self.output.parent)

    def _leave(self, error: BaseException) -> None:
        """Keep what is worth to be continued: bad input will not become better by itself."""
        finished = journal.read(self._fd).finished
        useless = isinstance(error, (InputError, UsageError)) and not self.earlier.finished
        if not finished or useless or self.complete:
            self._remove()
            return
        if not isinstance(error, (Nf4Error, OSError)):
            return  # a bug keeps its traceback
        raise UnfinishedRunError(
            f"{finished:,} of {self._total:,} weights are done and kept in {self.root}: continue "
            f"with the same command and --resume, or remove it: rm -r {self.root}",
            error,
        ) from error

    def _remove(self) -> None:
        """Everything that is ours; what others put there stays."""
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            (self.root / "journal").unlink(missing_ok=True)
            self.root.rmdir()
        except OSError:
            pass  # not empty, or the disk fails: nothing that the result depends on


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Where two headers differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in (*there, *(key for key in here if key not in there)):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(there.get(key), here.get(key), inner.replace("parts..", ""))
    elif there != here and name.endswith("plan"):
        yield "the plan (names, shapes or kinds of tensors, or config.json)"
    elif there != here:
        yield f"{name} was {there!r}, is {here!r}"
