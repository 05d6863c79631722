"""What an earlier run left, and how much of it stands: only what a digest proves is believed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
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
from ..threads import run
from . import journal
from .journal import Part, Upload


@dataclass(slots=True)
class Standing:
    """The finished work of an earlier run that was found to be as it was written.

    Attributes:
        results: by weight.
        outputs: digests of their tensors, by key.
        shards: digests of the output files that are complete, by name.
        sources: digests of source files that need not be read for them, by name.
        lost: weights that an earlier run finished, and whose bytes are not there.
        uploads: of the output files that were handed to a Hub and need not be here, by name.
    """

    results: dict[str, Result] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    sources: dict[str, FileDigests] = field(default_factory=dict)
    lost: int = 0
    uploads: dict[str, Upload] = field(default_factory=dict)

    def forget(self, plan: Plan, filenames: Collection[str]) -> None:
        """Take the weights in some output files for not made."""
        for t in plan.tensors:
            if t.outputs and plan.shards[t.file].filename in filenames:
                self.results.pop(t.name, None)
                for key in t.outputs:
                    self.outputs.pop(key, None)


def header(
    plans: Mapping[str, Plan], algorithm: str, destination: str | None = None
) -> dict[str, Any]:
    """Everything that the bytes of an output depend on, as far as headers tell: two runs with
    the same one write the same, if the bytes of the sources are the same.

    Args:
        destination: the repository that output files are handed to, and then leave the disk.
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
    """A digest of every decision of a plan."""
    digest = new_tensor_hash()
    for layout in plan.shards:
        digest.update(layout.filename.encode() + layout.header)
    for t in plan.tensors:
        where = (
            t.weight.shard.path.name,
            t.weight.stored,
            t.weight.scale and t.weight.scale.tensor,
        )
        digest.update(repr((t.name, t.action, t.rule, t.reason, where, t.view, t.file)).encode())
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
        directory: where its files lie.
        part: what its journal says.
        workers: threads.

    Raises:
        UsageError: the source is not the one that it read.
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
        layout = plan.shards[number]
        here = members.get(number, [])
        mine = [t for t in here if t.name in done]
        path = directory / layout.filename
        if layout.filename in part.uploads and len(mine) == len(here):
            with lock:
                upload = standing.uploads[layout.filename] = part.uploads[layout.filename]
                standing.shards[layout.filename] = upload.digest
                for t in mine:
                    standing.results[t.name], outputs = part.weights[t.name]
                    standing.outputs |= outputs
            return
        if not mine or not _is_whole(path, layout) or not _from_the_disk(path):
            return
        found, digest = _digests_of(path, layout, mine, len(mine) == len(here), algorithm,
                                    _until(stop, layout.filename, progress))  # fmt: skip
        good = [
            t for t in mine if all(found.get(k) == d for k, d in part.weights[t.name][1].items())
        ]
        with lock:
            for t in good:
                standing.results[t.name], outputs = part.weights[t.name]
                standing.outputs |= outputs
            if digest is not None and len(good) == len(here):
                standing.shards[layout.filename] = digest

    _each(range(len(plan.shards)), check_shard, workers)
    standing.lost = len(done) - len(standing.results)
    return standing


def _is_whole(path: Path, layout: ShardLayout) -> bool:
    """Whether a file of the size and with the header that were planned is there."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != layout.size:
        return False
    with path.open("rb") as file:
        return file.read(len(layout.header)) == layout.header


def _from_the_disk(path: Path) -> bool:
    """Have a file read from the disk, not from a memory that the disk may have lost; False where
    the disk says that it has."""
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
    whole: bool,
    algorithm: str,
    progress: Callable[[int], None],
) -> tuple[Mapping[str, str], str | None]:
    """Digests of the tensors written for `plans`, by key; of the file if they are the `whole`."""
    if whole:
        digest, tensors = digest_shard(read_shard(path), algorithm, progress)
        return tensors, digest
    keys = [layout.tensors[key] for t in plans for key in t.outputs]
    with ByteReader(path, layout.size) as reader:
        return {tensor.name: digest_tensor(reader, tensor, progress) for tensor in keys}, None


def _check_sources(
    plan: Plan, part: Part, algorithm: str, workers: int, progress: Progress
) -> dict[str, FileDigests]:
    """Digests of the source files that finished work was made from.

    A file in the state that it was in before it was read need not be read again; another one, a
    copy or a link that moved, may still hold the same bytes.  A commit of a Hub does not change.
    """
    if plan.checkpoint.origin is not None:
        return dict(part.files)
    needed: dict[str, dict[str, str]] = {name: {} for name in part.files}
    for result, _ in part.weights.values():
        for tensor, digest in result.sources.items():
            shard, _ = plan.checkpoint.tensors[tensor]
            needed.setdefault(shard.path.name, {})[tensor] = digest
    known: dict[str, FileDigests] = {}
    shards = {shard.path.name: shard for shard in plan.checkpoint.shards}

    def check_file(name: str, stop: threading.Event) -> None:
        shard, recorded = shards[name], part.files.get(name)
        if part.identities.get(name) == identity_of(shard.path.stat()):
            if recorded is not None:
                known[name] = recorded
            return
        try:
            digest, tensors = digest_shard(shard, algorithm, _until(stop, name, progress))
        except InputError as error:
            raise UsageError(f"the source changed since the run began: {error}") from error
        _require_same(shard, recorded, needed[name], digest, tensors)
        known[name] = FileDigests(digest, tensors)

    _each(sorted(needed), check_file, workers)
    return known


def _require_same(
    shard: Shard,
    recorded: FileDigests | None,
    needed: Mapping[str, str],
    digest: str,
    tensors: Mapping[str, str],
) -> None:
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


def _each(items: Iterable[Any], work: Callable[[Any, threading.Event], None], workers: int) -> None:
    """Work off items, some of which take seconds, so that Ctrl-C does not wait for one."""
    stop = threading.Event()
    run(items, lambda: lambda item: work(item, stop), workers, stop.set)


def _until(stop: threading.Event, name: str, progress: Progress) -> Callable[[int], None]:
    """What a long reading tells of its progress, which ends it when the run has ended."""

    def told(count: int) -> None:
        progress(name, 0)
        if stop.is_set():
            raise InterruptedRunError("interrupted")

    return told
