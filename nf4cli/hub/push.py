"""Push a finished output to a repository on a Hub: check it, send its files, and commit them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import stopping
from ..callbacks import Progress, no_progress
from ..checkpoint.discovery import CARD
from ..checkpoint.file_io import Identity
from ..checkpoint.model_files import never_kind
from ..checkpoint.untrusted import is_regular, read_start
from ..errors import InputError, InterruptedRunError
from ..output.listed_files import listed_output, read_listed, strays
from ..output.manifest import Manifest
from ..output.report import Finding
from ..threads import each
from .publish import Publication, Published

_AT_A_TIME = 4  # uploads; most files of a model are small, and each is a few requests


@dataclass(frozen=True, slots=True)
class Checked:
    """An output whose files were read and compared with its manifests.

    Attributes:
        path: its directory.
        manifests: by component; "" for a checkpoint that is no part of a pipeline.
        sha256: of each file of the output but the model card, by name; None for a file that may be
            edited, and was.
        identities: of the files that were read, by name.
        findings: files that are not what their manifest says.
        left: files in the directory that are no part of the output.
    """

    path: Path
    manifests: Mapping[str, Manifest]
    sha256: Mapping[str, str | None]
    identities: Mapping[str, Identity]
    findings: list[Finding]
    left: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the output but the model card."""
        return sum(identity[2] for identity in self.identities.values())

    @property
    def message(self) -> str:
        """The commit message where the user gives none."""
        manifest = max(self.manifests.values(), key=lambda m: m.quantized_parameters)
        base = manifest.source_repo or manifest.source_name
        return f"{base} in 4 bit, by nf4 {manifest.tool_version}"


def check(path: Path, workers: int = 1, progress: Progress = no_progress) -> Checked:
    """Read every file of an output once and compare it with the manifests.

    Args:
        path: a directory that nf4 quantize wrote: a checkpoint or a pipeline.
        workers: files read at a time.
        progress: told the bytes of each file that are read.

    Raises:
        InputError: `path` has no manifest, one is damaged, names a file outside, or lists one that
            is never published.
    """
    manifests, files = listed_output(path)
    _refuse_private(path, files)
    files = {name: listed for name, listed in files.items() if name != CARD}
    # Taken before the files are read: one that changes from here on is refused by `push`.
    identities = {n: read_start(f.path, 0)[2] for n, f in files.items() if is_regular(f.path)}
    sha256, findings, edited = read_listed(files, workers, progress)
    # A file that may be edited, like a component's card, is pushed as it is.
    digests = {**sha256, **dict.fromkeys(edited)}
    return Checked(path, manifests, digests, identities, findings, list(strays(path, files)))


def _refuse_private(path: Path, names: Iterable[str]) -> None:
    """Raise InputError if an output has files that are never published: an earlier nf4 copied
    them."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        if kind := never_kind(name):
            kinds.setdefault(kind, []).append(name)
    if kinds:
        said = "; ".join(f"{kind}: {', '.join(names[:10])}" for kind, names in kinds.items())
        raise InputError(
            f"{path} is not published, since its manifest lists files that nobody should see "
            f"({said}), which an earlier version of nf4 copied from the source. Quantize the "
            "source again, which leaves them out, and remove this output"
        )


def push(
    checked: Checked,
    publication: Publication,
    message: str | None = None,
    progress: Progress = no_progress,
) -> Published:
    """Send the files of a checked output that the Hub lacks, and commit them all.

    Args:
        checked: without findings.
        publication: prepared; `add` is called from several threads.
        message: of the commit; None for `checked.message`.
        progress: told the name of each file before it is sent.

    Raises:
        InputError, UsageError, MachineError: see `Publication`.
        InterruptedRunError: a stop was asked for; the Hub may have taken the commit or not.
    """
    assert not checked.findings, "only what is as it was written is pushed"
    names = sorted(checked.sha256)
    if is_regular(checked.path / CARD):
        names.append(CARD)

    def add(name: str, stop: threading.Event) -> None:
        progress(name, 0)
        publication.add(
            checked.path / name, name, checked.sha256.get(name), checked.identities.get(name)
        )

    try:
        # An upload under way may have gigabytes to go, or wait for a busy server: left behind.
        each(names, add, _AT_A_TIME, leave_behind=True)
        return stopping.leave_behind(partial(publication.commit, message or checked.message))
    except InterruptedRunError as error:
        raise InterruptedRunError(
            "interrupted: what was sent stays there, and the same command goes on from there",
            leaves=True,
        ) from error
