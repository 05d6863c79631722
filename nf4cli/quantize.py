"""Writing a 4-bit checkpoint: the files, their digests, the manifest, all or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .conversion import Conversion
from .digest import OrderedDigest, ShardDigest, digest_file
from .engines import Engine
from .limits import Resources, check_output
from .manifest import FileRecord, Manifest, RunRecord
from .output import new_directory, write_side_files
from .pipeline import Progress, no_progress
from .plan import Plan, TensorPlan
from .source import MANIFEST
from .writer import ShardWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Files:
    """The sink that writes: shards under construction, finished as their last tensor arrives.

    Weights come in file order, so their bytes are digested on the way; the companions behind
    them are read back when the file is complete.
    """

    def __init__(self, plan: Plan, directory: Path, algorithm: str) -> None:
        self._lock = threading.Lock()
        self._file_of = {key: t.file for t in plan.tensors for key in t.outputs}
        self._pending = [0] * len(plan.shards)
        for t in plan.tensors:
            self._pending[t.file] += bool(t.outputs)
        self._layouts = plan.shards
        self._directory = directory
        self._algorithm = algorithm
        self._writers: list[ShardWriter] = []
        self._turns: list[OrderedDigest] = []

    def open(self) -> None:
        """Create every file; `close` undoes it even when this fails half way."""
        for layout in self._layouts:
            self._writers.append(ShardWriter(self._directory, layout))
            digest = ShardDigest(layout.tensors.values(), self._algorithm)
            digest.update(layout.header)
            self._turns.append(OrderedDigest(digest))

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        number = self._file_of[key]
        writer = self._writers[number]
        writer.write(key, offset, data)
        if key in writer.layout.streamed:
            self._turns[number].update(writer.layout.tensors[key].start + offset, data)

    def finish(self, plan: TensorPlan) -> None:
        with self._lock:
            self._pending[plan.file] -= 1
            if self._pending[plan.file]:
                return
        writer = self._writers[plan.file]
        for piece in writer.tail():
            self._turns[plan.file].digest.update(piece)
        writer.finish()

    def abort(self) -> None:
        for turn in self._turns:
            turn.abort()

    def digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """(by file name, by tensor key), when all is finished."""
        files: dict[str, str] = {}
        tensors: dict[str, str] = {}
        for writer, turns in zip(self._writers, self._turns, strict=True):
            files[writer.layout.filename] = turns.digest.hexdigest()
            tensors |= turns.digest.tensors
        return files, tensors

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def write_checkpoint(
    plan: Plan,
    output: Path,
    engine: Engine,
    resources: Resources,
    digest: str = "blake3",
    fsync: bool = False,
    progress: Progress = no_progress,
) -> Manifest:
    """Quantize into `output`, which appears complete, with its manifest, or not at all.

    Everything is written in a sibling directory that is renamed at the end and removed on any
    failure.

    Args:
        fsync: wait for the disk before the rename, so that a power failure afterwards cannot
            undo a file (a later `nf4 verify` would notice; a crash of the process never can).

    Raises:
        UsageError, MachineError: see `check_output`.
        InputError: see `Conversion.run`.
        OSError: a disk is full or fails.
    """
    check_output(plan, output, resources.workers)
    with new_directory(output, fsync) as directory:
        return fill_directory(plan, directory, engine, resources, digest, progress)


def fill_directory(
    plan: Plan,
    directory: Path,
    engine: Engine,
    resources: Resources,
    digest: str,
    progress: Progress,
) -> Manifest:
    """Quantize into an empty directory, which the caller removes on any failure."""
    started = time.monotonic()
    write_side_files(directory, plan.checkpoint, plan.output_config, plan.index)
    files = _Files(plan, directory, digest)
    try:
        files.open()
        conversion = Conversion(plan, engine, resources, files, digest, directory, progress)
        conversion.run()
    finally:
        files.close()
    shard_digests, tensor_digests = files.digests()
    manifest = replace(
        conversion.manifest(tensor_digests),
        output_files=file_records(directory, digest, shard_digests),
        run=RunRecord(
            engine=engine.name,
            workers=resources.workers,
            seconds=round(time.monotonic() - started, 3),
            source=str(plan.checkpoint.root.resolve()),
        ),
    )
    (directory / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return manifest


def file_records(
    directory: Path, algorithm: str, known: Mapping[str, str]
) -> dict[str, FileRecord]:
    """Every file of a finished directory.

    Args:
        known: digests of files that need not be read again.
    """
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        digest = known.get(name) or digest_file(path, algorithm)
        files[name] = FileRecord(path.stat().st_size, digest)
    return files
