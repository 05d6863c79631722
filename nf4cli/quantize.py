"""Writing a 4-bit checkpoint: the files, their digests, the manifest, all or nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import stopping
from .card import write_card
from .complete import confirm, differs, is_of_commit
from .conversion import Conversion
from .digest import OrderedDigest, ShardDigest, digest_file, digest_shard, digest_tensor
from .engines import Engine, Notify, no_notice
from .errors import InputError, InterruptedRunError, MachineError, Nf4Error, UsageError
from .hub.carrier import Carrier
from .journal import Journal, Part
from .limits import Resources, check_output, room_for
from .manifest import FileRecord, Manifest
from .output import clear, write_side_files
from .pipeline import Progress, no_progress
from .planned import Plan, TensorPlan
from .reader import ByteReader, read_shard
from .records import FileDigests, Result, Shard
from .resume import Standing, check, header
from .source import IMPORTANCE, MANIFEST
from .watch import NOBODY, Watch
from .workspace import Workspace, earlier_header
from .writer import ShardLayout, ShardWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Files:
    """The sink that writes: shards under construction, finished as their last tensor arrives.

    Weights come in file order, so their bytes are digested on the way; the companions behind
    them are read back when the file is complete.  A shard that an earlier run began is read back
    whole.

    Args:
        directory: where the files are, or will be.
        journal: told of every weight that is written; `part` is this checkpoint's name in it.
        standing: what is there already.
        carrier: takes the files that are complete; they are then begun as late as they can be.
        watch: told of what is finished.
    """

    def __init__(
        self, plan: Plan, directory: Path, algorithm: str, journal: Journal, part: str,
        standing: Standing, carrier: Carrier | None, watch: Watch,
    ) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._opening = threading.RLock()
        self._file_of = {key: t.file for t in plan.tensors for key in t.outputs}
        self._pending = [0] * len(plan.shards)
        self._begun = [False] * len(plan.shards)
        for t in plan.tensors:
            done = t.name in standing.results
            self._pending[t.file] += bool(t.outputs) and not done
            self._begun[t.file] |= done
        self._layouts = plan.shards
        self._directory = directory
        self._algorithm = algorithm
        self._journal = journal
        self._part = part
        self._carrier = carrier
        self._watch = watch
        self._gone = standing.uploads.keys()
        self._writers: dict[int, ShardWriter] = {}
        self._turns: dict[int, OrderedDigest] = {}
        self._aborted = threading.Event()
        self.shard_digests = dict(standing.shards)
        self.tensor_digests = dict(standing.outputs)

    def open(self) -> None:
        """Create or open every file; `close` undoes it even when this fails half way."""
        for number, pending in enumerate(self._pending):
            name = self._layouts[number].filename
            if name in self._gone:
                continue
            if self._carrier is None or self._begun[number] or not pending:
                self._writer(number)
            if not pending and name not in self.shard_digests:
                self._finish_shard(number)
            elif not pending:
                self._shard_done(number)

    def _writer(self, number: int) -> ShardWriter:
        with self._opening:
            writer = self._writers.get(number)
            if writer is None:
                layout, begun = self._layouts[number], self._begun[number]
                writer = ShardWriter(self._directory, layout, begun)
                if not begun:
                    digest = ShardDigest(layout.tensors.values(), self._algorithm)
                    digest.update(layout.header)
                    self._turns[number] = OrderedDigest(digest)
                self._writers[number] = writer
                if self._aborted.is_set():
                    self.abort()
            return writer

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        number = self._file_of[key]
        writer = self._writer(number)
        turns = self._turns.get(number)
        writer.write(key, offset, data)
        if turns is not None and key in writer.layout.streamed:
            turns.update(writer.layout.tensors[key].start + offset, data)

    def finish(self, plan: TensorPlan, result: Result) -> None:
        writer = self._writer(plan.file)
        digests = {key: self._digest_of(writer, plan.file, key) for key in plan.outputs}
        self._watch.tensor(self._part, plan, result)
        with self._lock:
            self.tensor_digests |= digests
            self._pending[plan.file] -= 1
            last = not self._pending[plan.file]
        if plan.weight.stored.name in result.sources:
            self._journal.weight(self._part, plan.name, result, digests, writer.path)
        if last:
            self._finish_shard(plan.file)

    def source_read(self, shard: Shard, digests: FileDigests) -> None:
        self._journal.source_file(self._part, shard.path.name, digests)

    def abort(self) -> None:
        self._aborted.set()
        for turns in list(self._turns.values()):
            turns.abort()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _digest_of(self, writer: ShardWriter, number: int, key: str) -> str:
        turns = self._turns.get(number)
        if turns is not None and key in turns.digest.tensors:
            return turns.digest.tensors[key]
        with ByteReader(writer.path, writer.layout.size) as reader:
            return digest_tensor(reader, writer.layout.tensors[key])

    def _finish_shard(self, number: int) -> None:
        writer, turns = self._writers[number], self._turns.get(number)
        if turns is not None:
            for piece in writer.tail():
                turns.digest.update(piece)
            digest = turns.digest.hexdigest()
        else:
            shard = read_shard(writer.path)
            digest, _ = digest_shard(shard, self._algorithm, self._stop_when_aborted)
        writer.finish()
        self.shard_digests[writer.path.name] = digest
        self._shard_done(number)

    def _shard_done(self, number: int) -> None:
        layout = self._layouts[number]
        self._watch.file(self._part, layout.filename, layout.size)
        if self._carrier is not None:
            writer = self._writers[number]
            writer.close()
            self._carrier.shard_done(writer.path, self.shard_digests[writer.path.name])

    def _stop_when_aborted(self, count: int) -> None:
        if self._aborted.is_set():
            raise InterruptedRunError("interrupted")
        stopping.check()


def write_checkpoint(
    plan: Plan,
    output: Path,
    engine: Engine,
    resources: Resources,
    digest: str = "blake3",
    fsync: bool = True,
    resume: bool = False,
    progress: Progress = no_progress,
    notify: Notify = no_notice,
    carrier: Carrier | None = None,
    watch: Watch = NOBODY,
) -> Manifest:
    """Quantize into `output`, which appears complete, with its manifest, or not at all.

    Everything is written in a workspace beside it, whose files become the output in one rename.

    Args:
        fsync: wait for the disk, so that a power failure costs no more than a killed process.
        resume: continue a run of the same that was stopped, if there is one; be content with an
            output that is there already, if it is what this would write.
        carrier: brings the source from a Hub, or takes the output to one, or both.
        watch: told of every weight and file that is finished.

    Raises:
        UsageError, MachineError: see `check_output` and `Workspace`.
        InputError: see `Conversion.run`.
        OSError: a disk is full or fails.
        UnfinishedRunError: the same, and the work done so far was kept.
    """
    need = carrier.disk_needed(plan, resources.workers) if carrier else None
    check_output(plan, output, resources.workers, resume, need)
    if carrier is not None:
        carrier.require_room(plan)
        carrier.prepare()
        if carrier.leaving and resume and not earlier_header(output):
            there = carrier.manifest_there()
            if there and is_of_commit(plan, there) and not differs(plan, there, digest):
                stays = "; its README.md stays as well" * carrier.replaces_card
                notify(f"{carrier.destination} has this already, as this would write it{stays}")
                return there
    place = plan.checkpoint.root, plan.checkpoint.is_file
    recipe = header({"": plan}, digest, carrier.destination if carrier else None)
    with stopping.finishing():
        with Workspace(output, place, recipe, plan.written, fsync=fsync, resume=resume) as work:
            manifest = fill(
                work, "", plan, engine, resources, digest, progress, notify, carrier, watch
            )
            if carrier is not None and carrier.leaving:
                carrier.publish(work.directory, manifest)
                work.discard = True
        if carrier is not None and not carrier.leaving:
            with unpublished(output):
                carrier.publish(output, manifest)
    return manifest


@contextmanager
def unpublished(output: Path) -> Iterator[None]:
    """Have an error say that an output is there, all the same."""

    def told(why: BaseException) -> str:
        return f"{output} is complete, but was not published: {why}. Publish it with nf4 push"

    try:
        yield
    except InterruptedRunError as error:
        raise InterruptedRunError(told(error), leaves=True) from error
    except Nf4Error as error:
        kind = {kind.exit_code: kind for kind in (InputError, UsageError)}
        raise kind.get(error.exit_code, MachineError)(told(error)) from error


def fill(
    work: Workspace,
    part: str,
    plan: Plan,
    engine: Engine,
    resources: Resources,
    digest: str,
    progress: Progress,
    notify: Notify,
    carrier: Carrier | None = None,
    watch: Watch = NOBODY,
) -> Manifest:
    """Quantize into the directory `part` of a workspace, from wherever an earlier run got to."""
    if work.complete:
        manifest = confirm(plan, work.output / part, digest, resources, progress)
        notify(f"{work.output / part} is complete already, and as this would write it")
        return manifest
    directory = work.directory / part
    directory.mkdir(exist_ok=True)
    recorded = work.earlier.parts.get(part, Part())
    standing = check(plan, directory, recorded, digest, resources.workers, progress)
    if recorded.weights:
        notify(_what_stands(plan, standing))
    watch.resumed(part, (t for t in plan.tensors if t.name in standing.results))
    if carrier is not None:
        carrier.stay_below(room_for(work.output))
        carrier.fit(plan, standing, resources.workers)
    begun = {plan.shards[t.file].filename for t in plan.tensors if t.name in standing.results}
    clear(directory, {directory / name for name in begun - standing.uploads.keys()})
    if plan.checkpoint.origin is None:
        work.journal.identities(part, plan.checkpoint.shards)
    write_side_files(directory, plan.checkpoint, plan.output_config, plan.index)
    if plan.importance is not None:  # with it every byte can be derived again
        shutil.copyfile(plan.importance.path, directory / IMPORTANCE)
    files = _Files(plan, directory, digest, work.journal, part, standing, carrier, watch)
    with carrier.carrying(work, part, digest) if carrier else nullcontext() as source:
        try:
            files.open()
            conversion = Conversion(
                plan, engine, resources, files, digest, work.root, progress, standing, source
            )
            conversion.run()
        finally:
            files.close()
    manifest = replace(
        conversion.manifest(files.tensor_digests),
        output_files=file_records(directory, digest, files.shard_digests, plan.shards),
    )
    if not part:  # the card of a pipeline speaks of all its parts
        write_card(
            directory,
            None if plan.checkpoint.is_file else plan.checkpoint.root,
            manifest.source_name,
            {"": manifest},
            plan.output_config or {},
        )
    (directory / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return manifest


def _what_stands(plan: Plan, standing: Standing) -> str:
    lost = f"; {standing.lost:,} more did not reach the disk" if standing.lost else ""
    return (
        f"continuing an earlier run: {len(standing.results):,} of {plan.written:,} weights are "
        f"there, checked by their digests{lost}"
    )


def file_records(
    directory: Path, algorithm: str, known: Mapping[str, str], shards: Iterable[ShardLayout] = ()
) -> dict[str, FileRecord]:
    """Every file of a finished directory.

    Args:
        known: digests of files that need not be read again.
        shards: files that may have left it.
    """
    files = {layout.filename: FileRecord(layout.size, known[layout.filename]) for layout in shards}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        digest = known.get(name) or digest_file(path, algorithm)
        files[name] = FileRecord(path.stat().st_size, digest)
    return files
