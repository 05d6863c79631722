"""Publish a finished output on a Hub: the work of `nf4cli.push`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import stopping
from ..callbacks import Progress
from ..convert.listener import NOBODY, Listener, Stage
from ..errors import UsageError
from ..hub.errors import report_to
from ..hub.publish import Publication, Published
from ..hub.push import Checked, check
from ..hub.push import push as send
from ..hub.repository import require_access
from ..planning.pipeline_plan import part_shards
from .machine import processors
from .sources import require_repository

_NAMES_SHOWN = 5  # of files that are not pushed


@dataclass(frozen=True)
class Push:
    """What to publish, and where.

    Attributes:
        output: a directory that `quantize` wrote.
        repo: `org/name`, or `name` for one's own.
        public: whether a new repository is seen by everybody.
        replace_card: whether a README.md of the repository is replaced.
        message: of the commit, None for one that names the model.
        workers: files read at a time, None for one a processor.
        listener: told of the stages, their progress and notes.

    Raises:
        UsageError: the message is empty, or `repo` is no name of a repository.
    """

    output: Path
    repo: str
    public: bool = False
    replace_card: bool = False
    message: str | None = None
    workers: int | None = None
    listener: Listener = NOBODY

    def __post_init__(self) -> None:
        if self.message is not None and not self.message.strip():
            raise UsageError("--message is empty: leave it out, or say what the commit is")
        require_repository(self.repo)


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        checked: the files of the output, and the findings that forbid to publish it.
        published: where it is, None where there are findings and nothing was sent.
    """

    checked: Checked
    published: Published | None


def publish(asked: Push) -> Pushed:
    """Read every file of an output, and publish it if all are what the manifest says.

    Raises:
        UsageError, InputError, MachineError: it cannot be read or published.
        InterruptedRunError: a stop was asked for; the same call goes on where this one stopped.
    """
    listener, output = asked.listener, asked.output
    report_to(listener.note)
    require_access(asked.repo)
    with listener.stage(Stage("checking", _weight_bytes(output))) as progress:
        checked = check(output, asked.workers or processors(), progress)
    if checked.findings:
        return Pushed(checked, None)
    if checked.left:
        more = ", ..." if len(checked.left) > _NAMES_SHOWN else ""
        names = ", ".join(checked.left[:_NAMES_SHOWN])
        listener.note(f"not pushed, since no manifest lists it: {names}{more}")
    with listener.stage(Stage("pushing", checked.nbytes)) as progress:
        upload = _Upload(progress)
        publication = Publication(
            asked.repo, asked.public, asked.replace_card, listener.note, upload.sent
        )
        publication.prepare()
        with stopping.finishing():
            return Pushed(checked, send(checked, publication, asked.message, upload.begun))


class _Upload:
    """Names the file begun last, of several at a time, with the bytes that are sent."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._name = progress, ""

    def begun(self, name: str, _: int) -> None:
        self._name = name

    def sent(self, nbytes: int) -> None:
        self._progress(self._name, nbytes)


def _weight_bytes(output: Path) -> int:
    """Return the bytes of the weight files, about all that will be read."""
    return sum(file.stat().st_size for file in part_shards(output)) if output.is_dir() else 0
