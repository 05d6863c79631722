"""The directory that a run works in, beside its output: found again, locked, committed.

`.NAME.partial` holds `files`, which becomes the output in one rename, the journal, and `source`,
what was fetched from a Hub and is not read yet.  The journal is also the lock: the system releases
it when its process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import stopping
from ..checkpoint.file_io import sync
from ..errors import (
    InputError,
    InterruptedRunError,
    MachineError,
    Nf4Error,
    UnfinishedRunError,
    UsageError,
)
from . import journal
from .journal import Contents, Journal, Json
from .output_place import holds_output, refuse_place, workspace_of

_LARGEST_JOURNAL = 2_000_000_000  # bytes: 1,000 a weight, and no model has a million


class Workspace:
    """A run's own place.  Leaving it in good order makes `directory` the output.

    Args:
        output: must not exist, or be an empty directory.
        source: root of what is read, which `output` must not lie in; its directory for a file.
        header: what is being made of what; a run with another one is not continued.  None for
            a run that finishes no weight before its end, and so never can be.
        total: weights of the whole output, for messages.
        resume: continue what an earlier run left; without it such a thing is an error.
        scratch: nothing in it is of worth but to the next run of the same, which goes on without
            being asked to, and which removes what another one left.
        fsync: see Journal; at the end, wait for everything.

    Attributes:
        output: absolute.
        root: the workspace.
        directory: what will be the output; empty, or with an earlier run's files.
        fetched: where source files may be put that come from elsewhere; made by who needs it.
        discard: at the end nothing is to stay here: the output is somewhere else.
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
        scratch: bool = False,
    ) -> None:
        self._scratch = scratch
        self.output = output.absolute()
        self._source = source
        self._header = header or {}
        self._total = total
        self._resume = resume or scratch
        self._fsync = fsync
        self._committed = False
        self.root = workspace_of(output)
        self.directory = self.root / "files"
        self.fetched = self.root / "source"
        self.discard = False

    def __enter__(self) -> Workspace:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._lock()
        try:
            self.earlier = journal.read(self._fd)
            self.complete = self._resume and holds_output(self.output)
            if not self.complete:
                refuse_place(self._source[0], self.output, self._source[1])
                begun = bool(self.earlier.finished) and self.directory.is_dir()
                if begun and not (self._scratch and self.earlier.header != self._header):
                    self._require_the_same()
                else:
                    self._begin()
            self.journal = Journal(self._fd, self._fsync)
            if not self.earlier.finished and not self.complete:
                self.journal.restart(self._header)
            self.journal.start()
        except BaseException:
            if not (journal.read(self._fd).finished or self._has_fetched()):
                self._remove()
            os.close(self._fd)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                self.journal.close()
                self._leave(error)
                return
            try:
                self.journal.close()
                if not self.complete:
                    self.journal.require_good()
                    if not self.discard:
                        self._commit()
            except BaseException as late:
                self._leave_late(late)
            self._remove()
        finally:
            os.close(self._fd)

    def _leave_late(self, error: BaseException) -> None:
        """A run that had nothing left to do but to wait for the disk, or to clean up.

        Raises:
            `error`, or what `_leave` makes of it; nothing where the output is there and the user
            only did not want to wait.
        """
        self.journal.close()
        if not self._committed:
            self._leave(error)
            raise error
        if isinstance(error, OSError):
            raise MachineError(
                f"{self.output} is complete, but {self.output.parent} could not be synced: "
                f"{error.strerror or error}. Look at that disk"
            ) from error
        if not isinstance(error, InterruptedRunError):
            raise error

    def _lock(self) -> int:
        while True:
            with suppress(FileExistsError):
                self.root.mkdir()
            status = self.root.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise UsageError(
                    f"{self.root}, where the work on {self.output} would lie, is no directory, a "
                    "link or somebody else's: remove it, or choose another output"
                )
            path = self.root / "journal"
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                fd = os.open(path, flags, 0o644)
            except FileNotFoundError:
                continue  # another run, which has just finished, removed the directory
            except (IsADirectoryError, PermissionError) as error:
                raise UsageError(self._no_journal(path)) from error
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise UsageError(self._no_journal(path)) from error
                raise
            try:
                self._lock_file(fd, path)
                if path.exists() and os.path.samestat(path.stat(), os.fstat(fd)):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # that run has just finished

    def _lock_file(self, fd: int, path: Path) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_JOURNAL:
            raise UsageError(self._no_journal(path))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is writing {self.output}: wait for its end, or choose another output"
            ) from error
        except OSError as error:
            self._remove()
            raise MachineError(
                f"{path} cannot be locked ({error.strerror}): choose an output on another file "
                "system"
            ) from error

    def _no_journal(self, path: Path) -> str:
        return (
            f"{path} is not a journal of nf4 that we may write: remove {self.root}, or choose "
            "another output"
        )

    def _begin(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if not self._resume or self.earlier.header != self._header:
            shutil.rmtree(self.fetched, ignore_errors=True)
        self.earlier = Contents(None, {}, False)
        self.directory.mkdir()

    def _require_the_same(self) -> None:
        unfinished = (
            f"an unfinished run of nf4 quantize lies in {self.root} "
            f"({self.earlier.finished:,} weights done)"
        )
        if not self._header:
            raise UsageError(f"{unfinished}: finish it first, or remove it: {self._removal}")
        if not self._resume:
            raise UsageError(
                f"{unfinished}: continue it with the same command and --resume, or remove it: "
                f"{self._removal}"
            )
        if self.earlier.damaged:
            raise UsageError(
                f"{unfinished}, but its journal is damaged: remove it and start again: "
                f"{self._removal}"
            )
        differences = list(dict.fromkeys(_differences(self.earlier.header, self._header)))
        if differences:
            raise UsageError(
                f"{unfinished}, of something else: {'; '.join(differences[:8])}. Give the same "
                f"source and options again, or remove it: {self._removal}"
            )

    def _commit(self) -> None:
        if self._fsync:
            for path in (*self.directory.rglob("*"), self.directory):
                stopping.check()
                sync(path)
        stopping.check()
        self.directory.rename(self.output)
        self._committed = True
        if self._fsync:
            sync(self.output.parent)

    def _leave(self, error: BaseException) -> None:
        """Keep what is worth to be continued: bad input will not become better by itself."""
        finished = journal.read(self._fd).finished
        fetched = self._has_fetched()
        useless = isinstance(error, (InputError, UsageError)) and not self.earlier.finished
        if not (finished or fetched) or useless or self.complete:
            self._remove()
            return
        if not isinstance(error, (Nf4Error, OSError, InterruptedRunError)):
            return  # a bug keeps its traceback
        kept = f"{finished:,} of {self._total:,} weights are done and kept in {self.root}"
        if fetched:
            kept += ", and what was fetched"
        if isinstance(error, (InputError, UsageError)):
            advice = "if they are of no use now, remove them"
        else:
            going_on = "continue with the same command and --resume"
            if self._scratch:
                going_on = "the same command goes on from there"
            advice = f"{going_on}, or remove it"
        raise UnfinishedRunError(f"{kept}: {advice}: {self._removal}", error) from error

    def _has_fetched(self) -> bool:
        return self.fetched.is_dir() and any(self.fetched.iterdir())

    @property
    def _removal(self) -> str:
        return f"rm -r {shlex.quote(str(self.root))}"

    def _remove(self) -> None:
        """Everything that is ours; what others put there stays."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.fetched, ignore_errors=True)
        try:
            (self.root / "journal").unlink(missing_ok=True)
            self.root.rmdir()
        except OSError:
            pass  # not empty, or the disk fails: nothing that the result depends on


def earlier_header(output: Path) -> Json:
    """What an unfinished run of `output` makes of what, {} where there is none."""
    try:
        fd = os.open(workspace_of(output) / "journal", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_JOURNAL:
            return {}
        return journal.read(fd).header or {}
    finally:
        os.close(fd)


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
