"""A finished output -> a repository of a Hub: checked first, then sent, then seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import stopping
from ..callbacks import Progress, no_progress
from ..checkpoint.discovery import CARD
from ..checkpoint.file_io import Identity
from ..checkpoint.untrusted import is_regular, read_start
from ..errors import InterruptedRunError
from ..output.listed_files import listed_output, read_listed, strays
from ..output.manifest import Manifest
from ..output.report import Finding
from .publish import Publication, Published

_AT_A_TIME = 4  # uploads; most files of a model are small, and each is a few requests


@dataclass(frozen=True, slots=True)
class Checked:
    """An output whose files were read.

    Attributes:
        path: its directory.
        manifests: by component; "" is a checkpoint that is no part of a pipeline.
        sha256: of each file that belongs to it, by name, None for one that was edited as it may
            be; without the model card.
        identities: which files those were.
        findings: files that are not what their manifest says.
        left: files that lie there and do not belong to it.
    """

    path: Path
    manifests: Mapping[str, Manifest]
    sha256: Mapping[str, str | None]
    identities: Mapping[str, Identity]
    findings: list[Finding]
    left: list[str]

    @property
    def nbytes(self) -> int:
        """Of all files that belong to it."""
        return sum(identity[2] for identity in self.identities.values())

    @property
    def message(self) -> str:
        """What a commit of it is called, where nobody says."""
        manifest = max(self.manifests.values(), key=lambda m: m.quantized_parameters)
        base = manifest.source_repo or manifest.source_name
        return f"{base} in 4 bit, by nf4 {manifest.tool_version}"


def check(path: Path, workers: int = 1, progress: Progress = no_progress) -> Checked:
    """Read every file of an output once and compare it with the manifests.

    Args:
        path: a directory that nf4 quantize wrote: a checkpoint or a pipeline.
        workers: files read at a time.

    Raises:
        InputError: `path` has no manifest, one is damaged, or names a file outside.
    """
    manifests, files = listed_output(path)
    files = {name: listed for name, listed in files.items() if name != CARD}
    # Before they are read: what changes from here on is another file.
    identities = {n: read_start(f.path, 0)[2] for n, f in files.items() if is_regular(f.path)}
    sha256, findings, edited = read_listed(files, workers, progress)
    known = {**sha256, **dict.fromkeys(edited)}  # an edited card of a component goes up as it is
    return Checked(path, manifests, known, identities, findings, list(strays(path, files)))


def push(
    checked: Checked,
    publication: Publication,
    message: str | None = None,
    progress: Progress = no_progress,
) -> Published:
    """Send a checked output, what the Hub has not got of it, and commit it.

    Args:
        publication: prepared; `add` is called from several threads.
        message: of the commit.
        progress: told the name of each file before it is sent.

    Raises:
        InputError, UsageError, MachineError: see `Publication`.
        InterruptedRunError: a stop was asked for; the Hub may have taken the commit or not.
    """
    assert not checked.findings, "only what is as it was written is pushed"
    names = sorted(checked.sha256)
    if is_regular(checked.path / CARD):
        names.append(CARD)

    def add(name: str) -> None:
        progress(name, 0)
        publication.add(
            checked.path / name, name, checked.sha256.get(name), checked.identities.get(name)
        )

    try:
        _each(names, add)
        return stopping.leave_behind(partial(publication.commit, message or checked.message))
    except InterruptedRunError as error:
        raise InterruptedRunError(
            "interrupted: what was sent stays there, and the same command goes on from there",
            leaves=True,
        ) from error


def _each(names: Iterable[str], work: Callable[[str], None]) -> None:
    """Several at a time; the first failure, or Ctrl-C, ends it at once.

    Unlike threads.run it does not wait for what is under way: that may be an upload of gigabytes,
    or a server that asked for five minutes, and ends with the process.
    """
    queue, lock = iter(names), threading.Lock()
    failures: list[BaseException] = []

    def take() -> None:
        try:
            while not failures:
                with lock:
                    name = next(queue, None)
                if name is None:
                    return
                work(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(_AT_A_TIME)]
    try:
        for thread in threads:
            thread.start()
        stopping.join(threads, until=lambda: failures)
    except BaseException as error:
        failures.append(error)
    if failures:
        raise failures[0]
