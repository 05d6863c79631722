"""What the commands do with models that lie on a Hub: `org/name@revision` in place of a path."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import stopping
from ..errors import InputError, MachineError, Nf4Error, UsageError
from . import common
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..engines import Engine, Notify
    from ..hub.carrier import Carrier
    from ..hub.client import Name, Snapshot
    from ..hub.publish import Publication, Published
    from ..limits import Resources
    from ..manifest import Manifest
    from ..planned import Plan
    from ..records import Checkpoint, Origin
    from ..transfers import Transfers


SHARDS, LEAVING_SHARDS = "5GB", "1GB"
"""The largest output file, by default: as loaders write them; where files leave a bounded disk."""


def named(source: Path) -> Name | None:
    """The model of a Hub that an argument names; None for a path, and whatever exists is one."""
    from ..hub.client import parse

    return None if os.path.lexists(source) else parse(str(source))


def require_repository(name: str) -> None:
    """Raises UsageError for what is no name of a repository to push to."""
    from ..hub.client import parse

    if parse(name if "/" in name else f"me/{name}") is None or "@" in name:
        raise UsageError(
            f"{name!r} is no name of a repository: write org/name, or name for your own"
        )


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is read from.

    Attributes:
        path: a directory or file to plan from.
        snapshot: of a model on a Hub.
        outline: `path` holds no weights, only the headers of the files that have them.
    """

    path: Path
    snapshot: Snapshot | None = None
    outline: bool = False

    def open(self) -> Checkpoint:
        """Find out what the model has.

        Raises:
            InputError: see source.open_checkpoint.
        """
        from ..hub.outline import open_outline
        from ..source import open_checkpoint

        if self.snapshot is None:
            return open_checkpoint(self.path)
        return open_outline(self.snapshot, self.path)

    def origin_of(self, component: str) -> Origin | None:
        """Where a component of a pipeline comes from."""
        return self.snapshot.origin(component) if self.snapshot else None

    @property
    def name(self) -> str:
        """As a user would name it."""
        return str(self.snapshot.name) if self.snapshot else str(self.path)

    @property
    def called(self) -> str:
        """What exactly it is: with the commit."""
        if self.snapshot is None:
            return str(self.path)
        return f"{self.snapshot.repo}@{self.snapshot.commit}"


@contextmanager
def found(
    source: Path, keep: bool, quiet: bool, continued: Callable[[str], Path] | None = None
) -> Iterator[Source]:
    """A source that can be planned from, wherever it lies.

    Args:
        continued: where the output of a model of some name would be; a run of that which is
            continued goes on with the commit that it began with.
        keep: what is fetched stays in the user's cache.
        quiet: nothing is said of it.

    Raises:
        InputError, MachineError: see hub.client.resolve and hub.outline.draw.
    """
    name, notify = named(source), common.notices(quiet)
    if name is None:
        yield Source(source)
        return
    from ..hub import client
    from ..hub.explaining import report_to
    from ..hub.outline import draw

    report_to(notify)
    if continued is not None and name.revision is None:
        name = _as_begun(name, continued(_last(name)), notify)
    temporary = tempfile.TemporaryDirectory(prefix="nf4-", ignore_cleanup_errors=True)
    with stopping.whole(temporary) as place:
        directory = Path(place) / _last(name)
        directory.mkdir()
        with _called(name, directory):
            with ProgressDisplay(0, f"reading what {name} has", not quiet):
                try:
                    snapshot = client.persist(partial(client.resolve, name), notify)
                except (InputError, MachineError) as error:
                    raise type(error)(
                        f"{source} is no path here, and as a model of a Hub: {error}"
                    ) from error
                draw(snapshot, directory, keep)
            yield Source(directory, snapshot, outline=True)


@contextmanager
def _called(name: Name, directory: Path) -> Iterator[None]:
    """Has errors name a model as its user does, not the directory that its outline lies in."""
    try:
        yield
    except Nf4Error as error:
        for told in (error, getattr(error, "cause", None)):
            if isinstance(told, Nf4Error):
                told.args = (str(told).replace(str(directory), str(name)),)
        raise


def whole(source: Source, why: str, disk: str | None, quiet: bool) -> Source:
    """The same with all of its bytes, for what needs them at once: fetched to the cache.

    Args:
        why: what needs them.
        disk: as asked, a bound that this cannot keep.

    Raises:
        UsageError: there is a bound.
        InputError, MachineError: the model cannot be fetched.
    """
    if source.snapshot is None or not source.outline:
        return source
    if disk is not None:
        raise UsageError(
            f"--disk does not go with {why}, which needs all of {source.name} at once: without it, "
            "the model is fetched to the cache"
        )
    return Source(_fetch(source.snapshot, source.path, quiet), source.snapshot)


def local(source: Path, quiet: bool) -> Path:
    """A path for a command that reads a whole model: one of a Hub is fetched to the cache.

    Raises:
        InputError, MachineError: it cannot be had.
    """
    if named(source) is None:
        return source
    with found(source, True, quiet) as place:
        return whole(place, "this command", None, quiet).path


def as_recorded(source: Path, manifest: Manifest | None, notify: Notify) -> Path:
    """A source, at the commit that an output's manifest says it was made from, where its user names
    the same model of a Hub and no revision."""
    name = named(source)
    if name is None or name.revision is not None or manifest is None:
        return source
    if name.repo != manifest.source_repo or not manifest.source_commit:
        return source
    notify(f"{name.repo} at commit {manifest.source_commit}, which the manifest names")
    return Path(f"{name.repo}@{manifest.source_commit}")


def shown(asked: Path, path: Path) -> str:
    """What a user reads of a path that `local` gave: a model of a Hub with its commit, which names
    its directory in the cache."""
    name = named(asked)
    return str(path) if name is None else f"{name.repo}@{path.name}"


def _fetch(snapshot: Snapshot, outline: Path, quiet: bool) -> Path:
    from ..hub.fetching import fetch_all
    from ..hub.outline import names_in
    from ..transfers import Transfers

    names = names_in(outline)
    total = sum(snapshot.files[name].size for name in names)
    name = str(snapshot.name)
    with ProgressDisplay(total, "fetching", not quiet, what=name) as display:

        class Counted(Transfers):
            def add_downloaded(self, count: int) -> None:
                display(name, count)

        return fetch_all(snapshot, names, Counted(), common.notices(quiet))


def _last(name: Name) -> str:
    return name.repo.rpartition("/")[2]


def _as_begun(name: Name, output: Path, notify: Notify) -> Name:
    """The same model at the commit that an unfinished run of it began with."""
    from ..workspace import earlier_header

    part = earlier_header(output).get("parts", {}).get("", {}).get("source", {})
    commit = part.get("commit")
    if part.get("repo") != name.repo or not isinstance(commit, str):
        return name
    notify(f"continuing with the commit that the run began with, {name.repo}@{commit}")
    return name._replace(revision=commit)


@dataclass(frozen=True, slots=True)
class Trip:
    """What the options of quantize ask of a Hub and of the disk.

    Attributes:
        output, disk, push_to, public, replace_card: as asked.

    Raises:
        UsageError: options that do not go together.
    """

    output: Path | None
    disk: str | None
    push_to: str | None
    public: bool
    replace_card: bool
    notify: Notify

    def __post_init__(self) -> None:
        if self.disk is not None:
            common.parse_size(self.disk, "--disk")
        if self.push_to is not None:
            require_repository(self.push_to)
        for option, given in (("--public", self.public), ("--replace-card", self.replace_card)):
            if given and self.push_to is None:
                raise UsageError(f"{option} needs --push-to")

    @property
    def limit(self) -> int | None:
        """Bytes that may lie on the disk at once."""
        return None if self.disk is None else common.parse_size(self.disk, "--disk")

    @property
    def leaving(self) -> bool:
        """Whether no output stays here."""
        return self.push_to is not None and self.output is None

    def place(self, name: str) -> Path:
        """Where the output of a model is, or would be: beside it the run has its workspace.

        One that leaves is named after where it goes to, as the Hub's own cache would name it, so
        that nothing else that lies here is in its way.
        """
        if self.push_to is not None and self.leaving:
            return Path(f"models--{self.push_to.replace('/', '--')}")
        return self.output or Path(f"{name}-nf4")

    def stays(self, output: Path) -> Path | None:
        """The same for a document: None where nothing stays here."""
        return None if self.leaving else output

    def carrier(self, source: Source) -> Carrier | None:
        """What moves the files of a run; None for one that neither fetches nor pushes."""
        from ..hub.carrier import Carrier
        from ..transfers import Transfers

        snapshot = source.snapshot if source.outline else None
        if snapshot is None and self.limit is None and self.push_to is None:
            return None
        transfers = Transfers()
        publication = self.publication(transfers)
        return Carrier(snapshot, self.limit, publication, self.leaving, transfers, self.notify)

    def publication(self, transfers: Transfers) -> Publication | None:
        """What the output is pushed by, None for one that is not."""
        from ..hub.explaining import report_to
        from ..hub.publish import Publication

        if self.push_to is None:
            return None
        report_to(self.notify)
        return Publication(
            self.push_to, self.public, self.replace_card, self.notify, transfers.add_uploaded
        )

    def destination(self, output: Path) -> str:
        """Where the output goes to, as a user would name it."""
        return self.push_to if self.push_to and self.leaving else str(output)


def document_of(published: Published | None) -> dict[str, Any]:
    """What --json says of a run that pushed."""
    return {"pushed": asdict(published)} if published else {}


_LINKS = (("100 Mbit/s", 12.5e6), ("1 Gbit/s", 125e6), ("10 Gbit/s", 1.25e9))  # bytes a second


def outlook(
    source: Source,
    carrier: Carrier | None,
    plan: Plan,
    pushed: Callable[[], Plan],
    engine: Engine,
    limits: Resources,
) -> dict[str, Any]:
    """What --plan says of a model on a Hub; {} for one that lies here.

    Args:
        pushed: gives the plan of a run whose output leaves the disk.
    """
    from ..trial import bytes_per_second

    if carrier is None or not source.outline:
        return {}
    found = asdict(carrier.outlook(plan, pushed(), limits.workers))
    speed = bytes_per_second(engine, limits, plan.config)
    return {
        **found,
        "convert_bytes_per_second": round(speed),
        "convert_seconds": round(plan.source_bytes / speed, 1),
    }


def show_outlook(outlook: dict[str, Any]) -> None:
    """The same in words."""
    console, size = common.out_console(), common.format_size
    fetch = outlook["fetch_bytes"]
    cached = f", {size(outlook['cached_bytes'])} are in the cache" * bool(outlook["cached_bytes"])
    times = ", ".join(f"{_duration(fetch / speed)} at {name}" for name, speed in _LINKS)
    console.print(
        f"fetch   {fetch:,} bytes of {common.plain(outlook['repo'])}@{outlook['commit']}{cached}"
    )
    console.print(
        f"time    {_duration(outlook['convert_seconds'])} to convert (measured here: "
        f"{size(outlook['convert_bytes_per_second'])}/s)" + (f"; to fetch {times}" if fetch else "")
    )
    console.print(
        f"bound   --disk {_megabytes(outlook['smallest_disk_bytes'])} or more; with --push-to and "
        f"no OUTPUT {_megabytes(outlook['smallest_disk_bytes_when_pushed'])} or more"
    )


def _megabytes(count: int) -> str:
    return f"{-(-count // 1_000_000)}MB"


def _duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
