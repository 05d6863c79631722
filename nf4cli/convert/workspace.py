"""Own the directory that a run works in: lock it, find an earlier run's work, make it the output.

It lies beside the output, as `.NAME.partial`, and holds `files`, which becomes the output in one
rename; the journal; and `source`, files that were fetched from a Hub and are not read yet.  The
journal is also the lock: the system releases it when the process ends, however it ends.
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
    """A run's own directory; leaving the context without an error makes `directory` the output.

    Args:
        output: must not exist, or be an empty directory.
        source: (root of the source, whether the source is one file in that directory).  `output`
            must not lie in a source that is a directory.
        header: see `resume.header`; an earlier run with another one is not continued.  None for a
            run that journals no weight, so that it cannot be continued.
        total: number of weights of the whole output, for messages.
        fsync: see `Journal`; at the end, sync the whole output.
        resume: continue an earlier run; without it, an earlier run's work is an error.
        scratch: the files are only for the next run with the same header.  That run continues
            without `resume`; a run with another header removes them.

    Attributes:
        output: absolute path.
        root: the workspace.
        directory: what becomes the output; empty at first, or with an earlier run's files.
        fetched: where fetched source files may be put; whoever needs it creates it.
        discard: set it where the output lies elsewhere, so that nothing stays here at the end.
        earlier: the journal of an earlier run; empty where there is none.
        complete: an output exists already, which a run with `resume` may accept.
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
        """Lock the workspace, and find or discard an earlier run's work.

        Raises:
            UsageError: the output exists, another run is writing it, or an earlier run's work is
                in the way.
            MachineError: the file system has no locks.
            OSError: the disk fails.
        """
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
        """Make `directory` the output; after an error, keep finished work.

        Raises:
            UnfinishedRunError: finished work was kept; it names the error.
            MachineError: the output is complete, but its parent directory could not be synced.
            OSError: the disk failed.
        """
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
        """Deal with an error at the end of a run that had only to sync or to rename.

        A stop after the rename is ignored: the output is complete.

        Raises:
            UnfinishedRunError: see `_leave`.
            MachineError: the output is complete, but its parent directory could not be synced.
            BaseException: `error` itself.
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
        """Create and lock the workspace, and return the open journal.

        Raises:
            UsageError: something else lies there, or another run holds the lock.
            MachineError: see `_lock_file`.
        """
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
                continue  # another run has just finished and removed the directory
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
            os.close(fd)  # another run has just finished and removed this journal

    def _lock_file(self, fd: int, path: Path) -> None:
        """Lock the journal at `path`, which is open as `fd`.

        Raises:
            UsageError: it is no journal, or another run holds the lock.
            MachineError: the file system has no locks.
        """
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
        """Remove what an earlier run wrote; keep fetched files only for the same run again."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if not self._resume or self.earlier.header != self._header:
            shutil.rmtree(self.fetched, ignore_errors=True)
        self.earlier = Contents(None, {}, False)
        self.directory.mkdir()

    def _require_the_same(self) -> None:
        """Raise UsageError unless the earlier run can be continued, and the user asked for that."""
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
        """Rename the directory to the output, with everything on the disk where `fsync` is set."""
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
        """Keep finished work after an error, unless a new run would meet the same bad input.

        Raises:
            UnfinishedRunError: in place of `error`, where finished work was kept.
        """
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
            continuing = "continue with the same command and --resume"
            if self._scratch:
                continuing = "the same command goes on from there"
            advice = f"{continuing}, or remove it"
        raise UnfinishedRunError(f"{kept}: {advice}: {self._removal}", error) from error

    def _has_fetched(self) -> bool:
        return self.fetched.is_dir() and any(self.fetched.iterdir())

    @property
    def _removal(self) -> str:
        return f"rm -r {shlex.quote(str(self.root))}"

    def _remove(self) -> None:
        """Remove everything that nf4 put into the workspace; other files stay."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.fetched, ignore_errors=True)
        try:
            (self.root / "journal").unlink(missing_ok=True)
            self.root.rmdir()
        except OSError:
            pass  # not empty, or the disk fails: the output does not depend on it


def earlier_header(output: Path) -> Json:
    """Return the header of an unfinished run of `output`; {} where there is none."""
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


def _differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield, in words, where the header of an earlier run differs from that of this one.

    Args:
        name: path of the two values in the headers.
    """
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in (*earlier, *(key for key in now if key not in earlier)):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(earlier.get(key), now.get(key), inner.replace("parts..", ""))
    elif earlier != now and name.endswith("plan"):
        yield "the plan (names, shapes or kinds of tensors, or config.json)"
    elif earlier != now:
        yield f"{name} was {earlier!r}, is {now!r}"
