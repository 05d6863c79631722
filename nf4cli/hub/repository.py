"""Look at what a repository on a Hub holds: an earlier output, another model, or what was sent."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .. import stopping
from ..checkpoint.discovery import MANIFEST, PIPELINE_RECORD, is_weight_file
from ..checkpoint.untrusted import RECORD
from ..errors import InputError, MachineError, UsageError
from ..output.manifest import Manifest
from ..output.pipeline_record import Record
from .client import Snapshot, open_at
from .errors import endpoint, is_offline
from .upload import response_of

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a commit has to show of a file.

    Attributes:
        size: bytes.
        sha256: of its bytes, hexadecimal.
        blob: git's digest of a file in git itself; None for a file in LFS.
    """

    size: int
    sha256: str
    blob: str | None


def read_whole(head: Snapshot, name: str) -> bytes:
    """Return the bytes of a manifest or pipeline record in a commit.

    Raises:
        InputError: there is none, or it is too large.
        MachineError: see `open_at`; or fewer bytes come than the Hub states.
    """
    file = head.files.get(name)
    if file is None or file.size > RECORD.nbytes:
        raise InputError(f"it has no {name} that can be read")
    data = bytearray()
    with open_at(head, file, 0) as (_, chunks):
        for chunk in chunks:
            data += chunk
            if len(data) > file.size:
                break
    if len(data) != file.size:
        raise MachineError(f"{name}: {endpoint()} sent {len(data):,} of {file.size:,} bytes")
    return bytes(data)


def files_of_earlier_output(
    head: Snapshot, read: Callable[[str], bytes]
) -> tuple[frozenset[str], str]:
    """Return the files of the output that a commit holds, as its manifests list them.

    Args:
        read: returns the bytes of a file of that commit.

    Returns:
        (paths of the files, why there are none; "" where there are some).
    """

    def parsed(name: str, parse: Callable[[Path], Parsed]) -> Parsed:
        with stopping.whole(lambda: tempfile.TemporaryDirectory(prefix="nf4-")) as directory:
            path = Path(directory) / name.rpartition("/")[2]
            path.write_bytes(read(name))
            return parse(path)

    try:
        if PIPELINE_RECORD in head.files:
            record = parsed(PIPELINE_RECORD, Record.from_file)
            names = {PIPELINE_RECORD, *record.files}
            parts = [f"{component}/" for component in record.components]
        elif MANIFEST in head.files:
            names, parts = set(), [""]
        else:
            return frozenset(), f"it has no {MANIFEST}"
        for part in parts:
            manifest = parsed(part + MANIFEST, Manifest.from_file)
            names |= {part + MANIFEST, *(part + name for name in manifest.output_files)}
    except InputError as error:
        return frozenset(), str(error)
    return frozenset(names), ""


def refuse_another_model(repo: str, head: Snapshot, recorded: frozenset[str], why: str) -> None:
    """Raise UsageError if a commit has weight files that no manifest lists.

    Args:
        recorded: paths of the files that manifests list.
        why: there are no manifests; "" where there are.
    """
    foreign = sorted(
        name
        for name in head.files
        if is_weight_file(name.rpartition("/")[2]) and name not in recorded
    )
    if foreign:
        names = f"{', '.join(foreign[:5])}{', ...' if foreign[5:] else ''}"
        reason = why or f"its {MANIFEST} does not list them"
        raise UsageError(
            f"{repo} holds weights that nf4 did not put there ({names}; {reason}), and a loader "
            "could take them for ours: push to another repository, or delete them there first"
        )


def differences(
    shown: Snapshot, expected: Mapping[str, Expected], stale: Iterable[str]
) -> list[str]:
    """Return, in words, what a commit shows otherwise than it was sent.

    Args:
        expected: by path.
        stale: paths that the commit should not have.
    """
    wrong = []
    for name, sent in sorted(expected.items()):
        file = shown.files.get(name)
        if file is None:
            wrong.append(f"{name} is missing")
        elif file.size != sent.size:
            wrong.append(f"{name} has {file.size:,} bytes, expected {sent.size:,}")
        elif file.sha256 is not None and file.sha256 != sent.sha256:
            wrong.append(f"the sha256 of {name} is {file.sha256}, expected {sent.sha256}")
        elif file.sha256 is None and sent.blob not in (None, file.blob):
            wrong.append(f"{name} has git's digest {file.blob}, expected {sent.blob}")
        elif file.sha256 is None and sent.blob is None:
            wrong.append(f"{name} lies in git, expected in LFS")
    return wrong + [f"{name} is still there" for name in stale if name in shown.files]


def require_access(repo: str) -> None:
    """Check the right to write as far as this machine knows it; the Hub is not asked.

    Raises:
        UsageError: HF_HUB_OFFLINE is set.
        InputError: there is no token.
    """
    if is_offline():
        raise UsageError(f"{repo} cannot be written to: HF_HUB_OFFLINE forbids it. Unset it")
    _require_token(repo)


def _require_token(repo: str) -> None:
    from huggingface_hub import get_token

    if not get_token():
        raise InputError(
            f"{repo} cannot be written to without a token: log in with `hf auth login`, or set "
            f"HF_TOKEN to one of {endpoint()} that may write there"
        )


def no_access(repo: str, error: InputError) -> InputError:
    """Return an error in plain words where it is about the token, and unchanged otherwise."""
    status = getattr(response_of(error), "status_code", 0)
    if status not in (401, 403):
        return error
    why = "is not valid there" if status == 401 else "may not write to it"
    return InputError(
        f"{repo}: the token that {endpoint()} was given {why} (answer {status}): log in with "
        "`hf auth login`, or set HF_TOKEN to one with the right to write"
    )
