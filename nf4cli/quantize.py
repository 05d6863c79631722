"""Writing a 4-bit model: the files, their digests, the manifests, all or nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import stopping
from .card import write_card
from .complete import confirm, differs, is_of_commit
from .conversion import Conversion
from .diffusion import INDEX_FILE
from .digest import OrderedDigest, ShardDigest, digest_file, digest_shard, digest_tensor
from .engines import Engine
from .errors import InputError, InterruptedRunError, MachineError, Nf4Error, UsageError
from .journal import Journal, Part
from .limits import Resources, check_output
from .manifest import FileRecord, Manifest
from .model_plan import ModelPlan, path_in_model, place_for
from .output import clear, write_side_files
from .pipeline_record import Record, confirm_pipeline
from .planned import Plan, TensorPlan
from .reader import read_shard
from .records import FileDigests, Result, Shard
from .resume import Standing, check, header
from .source import IMPORTANCE, MANIFEST, PIPELINE_RECORD
from .transport import LOCAL, Carriage, Transport
from .untrusted import read_json
from .watch import NOBODY, Listener
from .workspace import Workspace, earlier_header
from .writer import ShardWriter

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
        carriage: takes the files that are complete.
        listener: told of what is finished.
    """

    def __init__(
        self, plan: Plan, directory: Path, algorithm: str, journal: Journal, part: str,
        standing: Standing, carriage: Carriage, listener: Listener,
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
        self._carriage = carriage
        self._listener = listener
        self._gone = standing.uploads.keys()
        self._writers: dict[int, ShardWriter] = {}
        self._turns: dict[int, OrderedDigest] = {}
        self._aborted = threading.Event()
        self.shard_digests = dict(standing.shards)
        self.tensor_digests = dict(standing.outputs)

    def open(self) -> None:
        """Open what an earlier run began, and finish files that nothing is left to be done for.

        `close` undoes it even when this fails half way. Other files are begun with their first
        weight, so that no more of them lie on the disk than have to.
        """
        for number, pending in enumerate(self._pending):
            name = self._layouts[number].filename
            if name in self._gone:
                continue
            if self._begun[number] or not pending:
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
        self._listener.tensor(self._part, plan, result)
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
        return digest_tensor(writer.reader(), writer.layout.tensors[key])

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
        layout, writer = self._layouts[number], self._writers[number]
        self._listener.file(self._part, layout.filename, layout.size)
        writer.close()
        name = path_in_model(self._part, layout.filename)
        self._carriage.file_done(name, writer.path, self.shard_digests[layout.filename])

    def _stop_when_aborted(self, count: int) -> None:
        if self._aborted.is_set():
            raise InterruptedRunError("interrupted")
        stopping.check()


@dataclass(frozen=True, slots=True)
class Execution:
    """How a plan is carried out: nothing of it changes a byte of the weights that are written.

    Attributes:
        digest: algorithm of the files' digests.
        fsync: wait for the disk, so that a power failure costs no more than a killed process.
        resume: continue a run of the same that was stopped, if there is one; be content with an
            output that is there already, if it is what this would write.
        listener: told how it goes on.
        transport: brings the source, and takes the output where it goes to.
    """

    engine: Engine
    resources: Resources
    digest: str = "blake3"
    fsync: bool = True
    resume: bool = False
    listener: Listener = NOBODY
    transport: Transport = LOCAL


def write_model(model: ModelPlan, output: Path, run: Execution) -> dict[str, Manifest]:
    """Quantize into `output`, which appears complete, with its manifests, or not at all.

    Everything is written in a workspace beside it, whose files become the output in one rename.

    Returns:
        The manifest of each part.

    Raises:
        UsageError, MachineError: see `check_output`, `Transport` and `Workspace`.
        InputError: see `Conversion.run`.
        OSError: a disk is full or fails.
        UnfinishedRunError: the same, and the work done so far was kept.
    """
    transport, workers = run.transport, run.resources.workers
    need = transport.disk_needed(model, workers)
    check_output(model, output, workers, run.resume or transport.scratch, need)
    transport.prepare(model)
    if transport.leaving and run.resume and not earlier_header(output):

        def is_same(part: str, found: Manifest) -> bool:
            plan = model.parts[part]
            return is_of_commit(plan, found) and not differs(plan, found, run.digest)

        there = transport.published(model, is_same)
        if there is not None:
            return there
    # What is only made for its digests is not what the command is for: a stop is never too late.
    with stopping.held_back() if transport.scratch else stopping.finishing():
        manifests = _write_in_workspace(model, output, run)
        if not transport.leaving:
            with unpublished(output):
                transport.publish(model, output, manifests, lambda names: None)
    return manifests


def _write_in_workspace(model: ModelPlan, output: Path, run: Execution) -> dict[str, Manifest]:
    """Write everything, and publish it where it does not stay; the manifest of each part."""
    transport = run.transport
    recipe = header(model.parts, run.digest, transport.destination)
    with Workspace(
        output, (model.root, model.is_file), recipe, model.written, fsync=run.fsync,
        resume=run.resume, scratch=transport.scratch,
    ) as work:  # fmt: skip
        manifests = _confirm(work, model, run) if work.complete else _fill(work, model, run)
        if transport.leaving:

            def forget(names: tuple[str, ...]) -> None:
                for part, name in map(model.part_and_name, names):
                    work.journal.lost(part, [name])

            transport.publish(model, work.directory, manifests, forget)
            work.discard = True
    return manifests


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


def _confirm(work: Workspace, model: ModelPlan, run: Execution) -> dict[str, Manifest]:
    """Return the manifests of the output that is there, when it is what this run would write."""
    manifests = {}
    for part, plan in model.parts.items():
        place = work.output / part
        manifests[part] = confirm(plan, place, run.digest, run.resources, run.listener.progress)
        run.listener.note(f"{place} is complete already, and as this would write it")
    if model.is_pipeline:
        confirm_pipeline(work.output, model.root, [*model.parts])
    return manifests


def _fill(work: Workspace, model: ModelPlan, run: Execution) -> dict[str, Manifest]:
    """Write everything into a workspace, from wherever an earlier run got to."""
    standings = {part: _standing(work, part, plan, run) for part, plan in model.parts.items()}
    carriage = run.transport.carry(work, model, standings, run.digest, run.resources.workers)
    if model.is_pipeline:
        ours = {*model.parts, *(name.partition("/")[0] for name in model.copies.files)}
        clear(work.directory, {work.directory / name for name in ours})
    for part, plan in model.parts.items():
        _write_beside(work, part, plan, standings[part])
    with carriage:
        manifests = {
            part: _convert(work, part, plan, standings[part], carriage, run)
            for part, plan in model.parts.items()
        }
        copied = _copy(work, model, carriage, run.digest)
    if model.is_pipeline:
        _write_record(work.directory, model, manifests, run.digest, copied)
        config = read_json(work.directory / INDEX_FILE)
    else:
        config = model.parts[""].output_config or {}
    source = None if model.is_file else model.root
    write_card(work.directory, source, model.name, manifests, config)
    return manifests


def _standing(work: Workspace, part: str, plan: Plan, run: Execution) -> Standing:
    """Return what an earlier run finished of a part, checked."""
    directory = work.directory / part
    directory.mkdir(exist_ok=True)
    recorded = work.earlier.parts.get(part, Part())
    standing = check(
        plan, directory, recorded, run.digest, run.resources.workers, run.listener.progress
    )
    if recorded.weights:
        run.listener.note(_what_stands(plan, standing))
    run.listener.resumed(part, (t for t in plan.tensors if t.name in standing.results))
    return standing


def _write_beside(work: Workspace, part: str, plan: Plan, standing: Standing) -> None:
    """Write everything small of a part anew, and remove what no finished weight lies in."""
    directory = work.directory / part
    begun = {plan.shards[t.file].filename for t in plan.tensors if t.name in standing.results}
    kept = {directory / name for name in begun - standing.uploads.keys()}
    clear(directory, kept)
    if plan.checkpoint.origin is None:
        work.journal.identities(part, plan.checkpoint.shards)
    write_side_files(directory, plan.checkpoint, plan.output_config, plan.index)
    if plan.importance is not None:  # with it every byte can be derived again
        shutil.copyfile(plan.importance.path, directory / IMPORTANCE)


def _convert(
    work: Workspace, part: str, plan: Plan, standing: Standing, carriage: Carriage, run: Execution
) -> Manifest:
    """Write the shards and the manifest of a part."""
    directory = work.directory / part
    files = _Files(
        plan, directory, run.digest, work.journal, part, standing, carriage, run.listener
    )
    try:
        files.open()
        conversion = Conversion(
            plan, run.engine, run.resources, files, run.digest, work.root, run.listener.progress,
            standing, carriage,
        )  # fmt: skip
        conversion.run()
    finally:
        files.close()
    shards = {layout.filename: layout.size for layout in plan.shards}
    known = {name: FileRecord(size, files.shard_digests[name]) for name, size in shards.items()}
    manifest = replace(
        conversion.manifest(files.tensor_digests),
        output_files=file_records(directory, run.digest, known),
    )
    (directory / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return manifest


def _copy(
    work: Workspace, model: ModelPlan, carriage: Carriage, algorithm: str
) -> dict[str, FileRecord]:
    """Write what a pipeline's output has beside its converted components.

    Returns:
        Size and digest of each file that holds weights, by its path: it may have been taken away.
    """
    uploads = work.earlier.parts.get("", Part()).uploads
    weights, copied = model.copies.weight_files, {}
    for name, source in model.copies.files.items():
        if name in weights and name in uploads:
            copied[name] = FileRecord(uploads[name].size, uploads[name].digest)
            continue
        target = place_for(work.directory, name)
        carriage.copy(source, target)
        if name in weights:
            copied[name] = FileRecord(weights[name], digest_file(target, algorithm))
            carriage.file_done(name, target, copied[name].digest)
    model.copies.write_texts(work.directory)
    return copied


def _write_record(
    directory: Path,
    model: ModelPlan,
    manifests: Mapping[str, Manifest],
    algorithm: str,
    copied: Mapping[str, FileRecord],
) -> None:
    """Write nf4_pipeline.json; `copied` is what `_copy` returns."""
    converted = {
        path_in_model(part, name): record
        for part, manifest in manifests.items()
        for name, record in manifest.output_files.items()
    }
    files = file_records(directory, algorithm, {**converted, **copied})
    beside = {name: record for name, record in files.items() if name not in converted}
    record = Record(algorithm, tuple(model.parts), beside)
    (directory / PIPELINE_RECORD).write_text(record.to_json(), "utf-8")


def _what_stands(plan: Plan, standing: Standing) -> str:
    lost = f"; {standing.lost:,} more did not reach the disk" if standing.lost else ""
    return (
        f"continuing an earlier run: {len(standing.results):,} of {plan.written:,} weights are "
        f"there, checked by their digests{lost}"
    )


def file_records(
    directory: Path, algorithm: str, known: Mapping[str, FileRecord]
) -> dict[str, FileRecord]:
    """Return size and digest of every file of a finished directory, by its path in it.

    Args:
        known: of files that need not be read again, or that were taken away.
    """
    files = dict(known)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in known:
            files[name] = FileRecord(path.stat().st_size, digest_file(path, algorithm))
    return files
