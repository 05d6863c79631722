"""Check how much of an earlier run's work still stands: only what a digest proves counts."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..callbacks import Progress
from ..checkpoint.digest import digest_shard, digest_tensor, new_tensor_hash
from ..checkpoint.file_io import identity_of, sync
from ..checkpoint.reader import ByteReader, read_shard
from ..checkpoint.types import FileDigests, Shard
from ..checkpoint.writer import ShardLayout
from ..errors import InputError, InterruptedRunError, UsageError
from ..output import manifest
from ..output.manifest import Result
from ..planning.plan import Plan, TensorPlan
from ..threads import each
from ..version import __version__
from . import journal
from .journal import Part, Upload


@dataclass(slots=True)
class Standing:
    """The finished work of an earlier run whose bytes are as they were written.

    Attributes:
        results: of the finished weights, by name.
        outputs: digests of their output tensors, by key.
        shards: digests of the complete output files, by name.
        sources: digests of the source files that need not be read to be digested, by name.
        lost: number of weights that an earlier run finished, and whose bytes are gone.
        uploads: of the output files that a Hub has, so that they need not be here, by name.
    """

    results: dict[str, Result] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    sources: dict[str, FileDigests] = field(default_factory=dict)
    lost: int = 0
    uploads: dict[str, Upload] = field(default_factory=dict)

    def forget(self, plan: Plan, filenames: Collection[str]) -> None:
        """Drop the finished weights in some output files, so that they are made again."""
        for t in plan.tensors:
            if t.outputs and plan.shards[t.file].filename in filenames:
                self.results.pop(t.name, None)
                for key in t.outputs:
                    self.outputs.pop(key, None)


def header(
    plans: Mapping[str, Plan], algorithm: str, destination: str | None = None
) -> dict[str, Any]:
    """Return everything but the sources' bytes that the bytes of an output depend on, as JSON.

    Two runs with the same header write the same bytes, if their sources hold the same bytes.

    Args:
        plans: by part.
        algorithm: of the files' digests.
        destination: of output files that leave the disk (see `Transport.destination`).
    """
    pushed = {} if destination is None else {"push_to": destination}
    return {
        **pushed,
        "nf4_journal": journal.VERSION,
        "nf4_manifest": manifest.VERSION,
        "tool": __version__,
        "digest": algorithm,
        "parts": {name: _part_header(plan) for name, plan in plans.items()},
    }


def _part_header(plan: Plan) -> dict[str, Any]:
    """Return the header of one part: recipe, source files and a digest of the plan."""
    return {
        "recipe": plan.config.as_dict(),
        "source": {
            "name": plan.checkpoint.name,
            "files": {shard.path.name: shard.size for shard in plan.checkpoint.shards},
            **(asdict(plan.checkpoint.origin) if plan.checkpoint.origin else {}),
        },
        "plan": _fingerprint(plan),
    }


def _fingerprint(plan: Plan) -> str:
    """Return a digest of every decision of a plan."""
    digest = new_tensor_hash()
    for layout in plan.shards:
        digest.update(layout.filename.encode() + layout.header)
    for t in plan.tensors:
        stored = tuple(
            (
                source.shard.path.name,
                source.stored,
                source.encoding and [tensor for _, tensor in source.encoding.companions],
            )
            for source in t.weight.sources
        )
        digest.update(repr((t.name, t.action, t.rule, t.reason, stored, t.view, t.file)).encode())
    digest.update(json.dumps([plan.index, plan.output_config]).encode())
    return digest.hexdigest()


def check(
    plan: Plan,
    directory: Path,
    part: Part,
    algorithm: str,
    workers: int,
    progress: Progress,
) -> Standing:
    """Check an earlier run's work on `plan`, byte by byte.

    Args:
        directory: where its output files lie.
        part: what its journal says of them.
        algorithm: of the files' digests.
        workers: threads.
        progress: told the name of each file that is read.

    Raises:
        UsageError: the source is not the one that the earlier run read.
        InputError: a source file cannot be read.
    """
    standing = Standing(sources=_check_sources(plan, part, algorithm, workers, progress))
    members: dict[int, list[TensorPlan]] = {}
    for t in plan.tensors:
        if t.outputs:
            members.setdefault(t.file, []).append(t)
    done = {
        t.name
        for t in plan.tensors
        if t.name in part.weights and part.weights[t.name][1].keys() == t.outputs.keys()
    }
    lock = threading.Lock()

    def check_shard(number: int, stop: threading.Event) -> None:
        layout, planned = plan.shards[number], members.get(number, [])
        finished = [t for t in planned if t.name in done]
        complete = len(finished) == len(planned)
        upload = part.uploads.get(layout.filename) if complete else None
        good, digest = finished, upload.digest if upload else None
        if upload is None and finished:
            path, on_piece = directory / layout.filename, _until(stop, layout.filename, progress)
            digests, digest = _digests_of(path, layout, finished, complete, algorithm, on_piece)
            good = [t for t in finished if part.weights[t.name][1].items() <= digests.items()]
        with lock:
            for t in good:
                standing.results[t.name], outputs = part.weights[t.name]
                standing.outputs |= outputs
            if digest is not None and len(good) == len(planned):
                standing.shards[layout.filename] = digest
            if upload is not None:
                standing.uploads[layout.filename] = upload

    each(range(len(plan.shards)), check_shard, workers)
    standing.lost = len(done) - len(standing.results)
    return standing


def _is_whole(path: Path, layout: ShardLayout) -> bool:
    """Return whether a file exists with the size and the header that were planned."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != layout.size:
        return False
    with path.open("rb") as file:
        return file.read(len(layout.header)) == layout.header


def _from_the_disk(path: Path) -> bool:
    """Make sure that a file is read from the disk, and not from the system's cache.

    After a write error the cache may hold bytes that the disk has lost.

    Returns:
        False where the disk reports such an error.
    """
    try:
        sync(path)
    except OSError:
        return False
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return True


def _digests_of(
    path: Path,
    layout: ShardLayout,
    plans: Iterable[TensorPlan],
    complete: bool,
    algorithm: str,
    on_piece: Callable[[int], None],
) -> tuple[dict[str, str], str | None]:
    """Digest the tensors in an output file that were written for `plans`.

    Args:
        complete: these are all of the file, so that the file is digested as well.
        on_piece: called after each piece that is read.

    Returns:
        (digests by key, that of the file or None); nothing where the file is not as planned.
    """
    if not _is_whole(path, layout) or not _from_the_disk(path):
        return {}, None
    if complete:
        digest, tensors = digest_shard(read_shard(path), algorithm, on_piece)
        return tensors, digest
    keys = [layout.tensors[key] for t in plans for key in t.outputs]
    with ByteReader(path, layout.size) as reader:
        return {tensor.name: digest_tensor(reader, tensor, on_piece) for tensor in keys}, None


def _check_sources(
    plan: Plan, part: Part, algorithm: str, workers: int, progress: Progress
) -> dict[str, FileDigests]:
    """Check the source files that finished work was made from, and return their digests by name.

    A file that has not changed since the earlier run opened it (`Identity`) is not read again.
    Another one is: a copy may hold the same bytes.  A commit of a Hub does not change.

    Raises:
        UsageError: a file holds other bytes than the earlier run read.
    """
    if plan.checkpoint.origin is not None:
        return dict(part.files)
    needed: dict[str, dict[str, str]] = {name: {} for name in part.files}
    for result, _ in part.weights.values():
        for tensor, digest in result.sources.items():
            shard, _ = plan.checkpoint.tensors[tensor]
            needed.setdefault(shard.path.name, {})[tensor] = digest
    digests: dict[str, FileDigests] = {}
    shards = {shard.path.name: shard for shard in plan.checkpoint.shards}

    def check_file(name: str, stop: threading.Event) -> None:
        shard, recorded = shards[name], part.files.get(name)
        if part.identities.get(name) == identity_of(shard.path.stat()):
            if recorded is not None:
                digests[name] = recorded
            return
        try:
            digest, tensors = digest_shard(shard, algorithm, _until(stop, name, progress))
        except InputError as error:
            raise UsageError(f"the source changed since the run began: {error}") from error
        _require_same(shard, recorded, needed[name], digest, tensors)
        digests[name] = FileDigests(digest, tensors)

    each(sorted(needed), check_file, workers)
    return digests


def _require_same(
    shard: Shard,
    recorded: FileDigests | None,
    needed: Mapping[str, str],
    digest: str,
    tensors: Mapping[str, str],
) -> None:
    """Raise UsageError if a source file holds other bytes than an earlier run read.

    Args:
        recorded: the file's digests, where that run read all of it.
        needed: digests of the tensors that its finished weights were made from, by name.
        digest, tensors: of the file as it is now.
    """
    for tensor, before in {**needed, **(recorded.tensors if recorded else {})}.items():
        if tensors[tensor] != before:
            raise UsageError(
                f"the source changed since the run began: {tensor} in {shard.path} has the digest "
                f"{tensors[tensor]}, it was {before}"
            )
    if recorded is not None and digest != recorded.digest:
        raise UsageError(
            f"the source changed since the run began: {shard.path} has the digest {digest}, it was "
            f"{recorded.digest}"
        )


def _until(stop: threading.Event, name: str, progress: Progress) -> Callable[[int], None]:
    """Return a function that a long read calls after each piece, and that ends it after `stop`."""

    def on_piece(count: int) -> None:
        progress(name, 0)
        if stop.is_set():
            raise InterruptedRunError("interrupted")

    return on_piece
