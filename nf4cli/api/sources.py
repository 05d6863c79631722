"""Find the model that a user names: a path, or `org/name@revision` on the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import stopping
from ..convert.listener import NOBODY, Listener, Stage
from ..errors import InputError, MachineError, Nf4Error, UsageError

if TYPE_CHECKING:
    from ..callbacks import Notify
    from ..checkpoint.types import Checkpoint, Origin
    from ..hub.client import Name, Snapshot
    from ..output.manifest import Manifest
    from .machine import Machine


def named(source: Path) -> Name | None:
    """Return the model on a Hub that an argument names; None for a path, and for what exists."""
    from ..hub.client import parse

    return None if os.path.lexists(source) else parse(str(source))


def is_there(source: Path) -> bool:
    """Return whether something lies at a path, or an argument can be a name on a Hub."""
    return os.path.lexists(source) or named(source) is not None


def require_there(source: Path) -> None:
    """Refuse a path where nothing is, before what reads a model is imported.

    Raises:
        InputError: as `open_checkpoint` says it.
    """
    if not is_there(source):
        from ..checkpoint.discovery import open_checkpoint

        open_checkpoint(source)


def require_repository(name: str) -> None:
    """Raise UsageError if `name` cannot be a repository to push to."""
    from ..hub.client import parse

    if parse(name if "/" in name else f"me/{name}") is None or "@" in name:
        raise UsageError(
            f"{name!r} is no name of a repository: write org/name, or name for your own"
        )


@dataclass(frozen=True, slots=True)
class Files:
    """Which files of a model on a Hub are wanted beside its headers and small files.

    Attributes:
        copy: patterns of --copy.
        headers_only: of parts beside the model too, for a plan that is not carried out.
    """

    copy: tuple[str, ...] = ()
    headers_only: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A model to read.

    Attributes:
        path: a directory or file to plan from.
        snapshot: the files of a model on a Hub at one commit, None for a path.
        outline: `path` holds only the headers of weight files, and small files whole.
    """

    path: Path
    snapshot: Snapshot | None = None
    outline: bool = False

    def open(self) -> Checkpoint:
        """Return the model's tensors and files.

        Raises:
            InputError: see `open_checkpoint` and `open_outline`.
        """
        from ..checkpoint.discovery import open_checkpoint
        from ..hub.outline import open_outline

        if self.snapshot is None:
            return open_checkpoint(self.path)
        return open_outline(self.snapshot, self.path)

    def origin_of(self, component: str) -> Origin | None:
        """Return the repository, commit and digests of a component; None for a path.

        Args:
            component: of a pipeline; "" for a checkpoint without one.
        """
        return self.snapshot.origin(component) if self.snapshot else None

    @property
    def name(self) -> str:
        """The model as its user names it."""
        return str(self.snapshot.name) if self.snapshot else str(self.path)

    @property
    def called(self) -> str:
        """The model as messages call it: its path, or repository and commit."""
        if self.snapshot is None:
            return str(self.path)
        return f"{self.snapshot.repo}@{self.snapshot.commit}"


@contextmanager
def found(
    source: Path,
    keep: bool,
    listener: Listener = NOBODY,
    continued: Callable[[str], Path] | None = None,
    files: Files = Files(),
) -> Iterator[Source]:
    """Yield a source that can be planned from; of a model on a Hub, its outline.

    Args:
        keep: small files that are fetched stay in the user's cache.
        continued: for a run that is continued: gives the output's directory for the model's name.
            The source is then at the commit that the run began with.
        files: what is fetched.

    Raises:
        InputError, MachineError: see `client.resolve` and `outline.draw`.
    """
    name, notify = named(source), listener.note
    if name is None:
        yield Source(source)
        return
    from ..hub import client
    from ..hub.errors import report_to
    from ..hub.outline import draw
    from ..hub.retries import persist

    report_to(notify)
    if continued is not None and name.revision is None:
        name = _as_begun(name, continued(_last(name)), notify)
    make = partial(tempfile.TemporaryDirectory, prefix="nf4-", ignore_cleanup_errors=True)
    with stopping.whole(make) as place:
        directory = Path(place) / _last(name)
        directory.mkdir()
        with _called(name, directory):
            with listener.stage(Stage(f"reading what {name} has")):
                try:
                    snapshot = persist(partial(client.resolve, name), notify)
                except (InputError, MachineError) as error:
                    raise type(error)(
                        f"{source} is no path here, and as a model of a Hub: {error}"
                    ) from error
                draw(snapshot, directory, keep, files.copy, files.headers_only)
            yield Source(directory, snapshot, outline=True)


@contextmanager
def _called(name: Name, directory: Path) -> Iterator[None]:
    """In messages of errors, replace the directory of an outline by the model's name."""
    try:
        yield
    except Nf4Error as error:
        for raised in (error, getattr(error, "cause", None)):
            if isinstance(raised, Nf4Error):
                raised.args = (str(raised).replace(str(directory), str(name)),)
        raise


def whole(source: Source, why: str, bounded: bool, listener: Listener) -> Source:
    """Return the same source with all of its bytes; one on a Hub is fetched to the cache.

    Args:
        why: what needs all bytes at once, for the message.
        bounded: the user has set a limit on the disk, which this cannot keep.

    Raises:
        UsageError: there is a limit.
        InputError, MachineError: the model cannot be fetched.
    """
    if source.snapshot is None or not source.outline:
        return source
    if bounded:
        raise UsageError(
            f"--disk does not go with {why}, which needs all of {source.name} at once: without it, "
            "the model is fetched to the cache"
        )
    return Source(_fetch(source.snapshot, source.path, listener), source.snapshot)


def local(source: Path, listener: Listener) -> Path:
    """Return a model's path; one on a Hub is fetched to the cache.

    Raises:
        InputError, MachineError: the model cannot be fetched.
    """
    if named(source) is None:
        return source
    with found(source, True, listener) as place:
        return whole(place, "this command", False, listener).path


def shared(source: Path, machine: Machine) -> Path:
    """Return a model's path as `local` does; with a cluster an absolute one, and none on a Hub.

    Nodes have working directories of their own, and do not see this machine's cache.

    Raises:
        UsageError: there is a cluster, and the model is on a Hub.
        InputError, MachineError: the model cannot be fetched.
    """
    if machine.ray is None:
        return local(source, machine.listener)
    if named(source) is not None:
        raise UsageError(
            f"--ray reads from a directory that all nodes share, and {source} is on a Hub: "
            "download it there first, with hf download"
        )
    return Path(os.path.abspath(source))  # noqa: PTH100 - a link stays one


def as_recorded(source: Path, manifest: Manifest | None, notify: Notify) -> Path:
    """Return a source at the commit that an output's manifest records.

    That is where the user names the same model of a Hub without a revision; else return the source
    as it is.
    """
    name = named(source)
    if name is None or name.revision is not None or manifest is None:
        return source
    if name.repo != manifest.source_repo or not manifest.source_commit:
        return source
    notify(f"{name.repo} at commit {manifest.source_commit}, which the manifest names")
    return Path(f"{name.repo}@{manifest.source_commit}")


def shown(asked: Path, path: Path) -> str:
    """Return what messages call a model: its path, or repository and commit.

    Args:
        asked: the model as its user names it.
        path: what `local` returned for it; in the cache its name is the commit.
    """
    name = named(asked)
    return str(path) if name is None else f"{name.repo}@{path.name}"


def _fetch(snapshot: Snapshot, outline: Path, listener: Listener) -> Path:
    """Fetch all files of an outline to the cache, and return their directory."""
    from ..convert.transfers import Transfers
    from ..hub.fetching import fetch_all
    from ..hub.outline import names_in

    names = names_in(outline)
    total = sum(snapshot.files[name].size for name in names)
    name = str(snapshot.name)
    with listener.stage(Stage("fetching", total, name)) as progress:

        class Counted(Transfers):
            def add_downloaded(self, count: int) -> None:
                progress(name, count)

        return fetch_all(snapshot, names, Counted(), listener.note)


def _last(name: Name) -> str:
    """Return a repository's name without its owner."""
    return name.repo.rpartition("/")[2]


def _as_begun(name: Name, output: Path, notify: Notify) -> Name:
    """Return the model at the commit that an unfinished run of it began with."""
    from ..convert.workspace import earlier_header

    part = earlier_header(output).get("parts", {}).get("", {}).get("source", {})
    commit = part.get("commit")
    if part.get("repo") != name.repo or not isinstance(commit, str):
        return name
    notify(f"continuing with the commit that the run began with, {name.repo}@{commit}")
    return name._replace(revision=commit)
