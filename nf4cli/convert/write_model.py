"""Write a 4-bit model: its files, their digests and its manifests, all of them or none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .. import stopping
from ..checkpoint.digest import digest_file
from ..checkpoint.discovery import IMPORTANCE, MANIFEST, PIPELINE_RECORD
from ..checkpoint.untrusted import read_json
from ..engines.protocol import Engine
from ..errors import InterruptedRunError, Nf4Error, error_with
from ..output.already_there import confirm, copies_otherwise, differs, is_of_commit
from ..output.card import write_card
from ..output.manifest import FileRecord, Manifest, manifest_of
from ..output.pipeline_record import Record, confirm_pipeline
from ..planning.model_plan import ModelPlan, path_in_model, place_for
from ..planning.pipeline_plan import INDEX_FILE
from ..planning.plan import Plan
from ..planning.resources import Resources
from .conversion import Conversion, Tools
from .journal import Part, Upload
from .listener import NOBODY, Listener
from .make_units import MakeFile
from .output_place import check_output
from .resume import Standing, check, header
from .shard_files import ShardFiles, file_records
from .side_files import clear, write_side_files
from .tasks import Cluster
from .transport import LOCAL, Carriage, Transport
from .units import Collected, Made, cut, require_unchanged
from .workspace import Workspace, earlier_header


@dataclass(frozen=True, slots=True)
class Execution:
    """How a plan is carried out.  Nothing here changes a byte of the weights that are written.

    Attributes:
        engine: quantizes.
        resources: threads, and bytes of their buffers.
        digest: algorithm of the files' digests.
        fsync: wait for the disk, so that a power failure costs no more than a killed process.
        resume: continue an earlier run that was stopped, if there is one; accept an output that
            exists already, if it is what this run would write.
        listener: told of the run's progress.
        transport: brings the source files, and takes the output files to their destination.
        cluster: makes each output file somewhere else; None to make them here.
    """

    engine: Engine
    resources: Resources
    digest: str = "blake3"
    fsync: bool = True
    resume: bool = False
    listener: Listener = NOBODY
    transport: Transport = LOCAL
    cluster: Cluster | None = None


def write_model(model: ModelPlan, output: Path, run: Execution) -> dict[str, Manifest]:
    """Quantize a model into `output`, which appears complete, with its manifests, or not at all.

    Everything is written in a workspace beside it, whose files become the output in one rename.

    Returns:
        The manifest of each part.

    Raises:
        UsageError, MachineError: see `check_output`, `Transport` and `Workspace`.
        InputError: see `Conversion.run`.
        OSError: a disk is full or fails.
        UnfinishedRunError: in place of one of these, when finished work was kept.
    """
    transport, workers = run.transport, run.resources.workers
    need = transport.disk_needed(model, workers)
    check_output(model, output, workers, run.resume or transport.scratch, need)
    transport.prepare(model)
    if transport.leaving and run.resume and not earlier_header(output):

        def is_same(part: str, manifest: Manifest) -> bool:
            plan = model.parts[part]
            same = is_of_commit(plan, manifest) and not differs(plan, manifest, run.digest)
            return same and copies_otherwise(plan, manifest) is None

        published = transport.published(model, is_same)
        if published is not None:
            return published
    # An output that is made only for its digests (verify --disk) can be stopped at any time: when
    # it is complete, the command is not done.
    with stopping.held_back() if transport.scratch else stopping.finishing():
        manifests = _write_in_workspace(model, output, run)
        if not transport.leaving:
            with unpublished(output):
                transport.publish(model, output, manifests, lambda names: None)
    return manifests


def _write_in_workspace(model: ModelPlan, output: Path, run: Execution) -> dict[str, Manifest]:
    """Write everything, publish an output that does not stay, and return each part's manifest."""
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
    """Make errors within the block say that the output is complete, but not published.

    Raises:
        InterruptedRunError, InputError, UsageError, MachineError: with the exit code of the error
            in the block.
    """

    def message(why: BaseException) -> str:
        return f"{output} is complete, but was not published: {why}. Publish it with nf4 push"

    try:
        yield
    except InterruptedRunError as error:
        raise InterruptedRunError(message(error), leaves=True) from error
    except Nf4Error as error:
        raise error_with(error.exit_code, message(error)) from error


def _confirm(work: Workspace, model: ModelPlan, run: Execution) -> dict[str, Manifest]:
    """Return the manifests of the output that exists already.

    Raises:
        UsageError: it is not what this run would write.
        InputError: the source cannot be read.
    """
    manifests = {}
    for part, plan in model.parts.items():
        directory = work.output / part
        manifests[part] = confirm(plan, directory, run.digest, run.resources, run.listener.progress)
        run.listener.note(f"{directory} is complete already, and as this would write it")
    if model.is_pipeline:
        confirm_pipeline(work.output, model.copies, [*model.parts])
    return manifests


def _fill(work: Workspace, model: ModelPlan, run: Execution) -> dict[str, Manifest]:
    """Write into a workspace whatever no earlier run has written, and return the manifests."""
    standings = {part: _standing(work, part, plan, run) for part, plan in model.parts.items()}
    carriage = run.transport.carry(work, model, standings, run.digest, run.resources.workers)
    if model.is_pipeline:
        ours = {*model.parts, *(name.partition("/")[0] for name in model.copies.files)}
        clear(work.directory, {work.directory / name for name in ours})
    for part, plan in model.parts.items():
        _write_beside(work, part, plan, standings[part])
    with carriage:
        manifests = {
            part: (
                _convert(work, part, plan, standings[part], carriage, run)
                if run.cluster is None
                else _convert_elsewhere(work, part, plan, standings[part], run, run.cluster)
            )
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
    """Check what an earlier run finished of a part, and return what stands."""
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
    """Write a part's small files anew, and remove every shard that holds no finished weight."""
    directory = work.directory / part
    begun = {plan.shards[t.file].filename for t in plan.tensors if t.name in standing.results}
    kept = {directory / name for name in begun - standing.uploads.keys()}
    clear(directory, kept)
    if plan.checkpoint.origin is None:
        work.journal.identities(part, plan.checkpoint.shards)
    write_side_files(directory, plan.checkpoint, plan.output_config, plan.index)
    if plan.importance is not None:  # `nf4 verify --source` needs it to make every byte again
        shutil.copyfile(plan.importance.path, directory / IMPORTANCE)


def _convert(
    work: Workspace, part: str, plan: Plan, standing: Standing, carriage: Carriage, run: Execution
) -> Manifest:
    """Write the shards and the manifest of a part."""
    directory = work.directory / part
    files = ShardFiles(
        plan, directory, run.digest, work.journal, part, standing, carriage.file_done, run.listener
    )
    try:
        files.open()
        tools = Tools(run.engine, run.resources, run.listener.progress)
        conversion = Conversion(
            plan, tools, files, run.digest, standing, carriage, scratch=work.root
        )
        conversion.run()
    finally:
        files.close()
    manifest = conversion.manifest(files.tensor_digests)
    return _write_manifest(directory, plan, manifest, files.shard_digests)


def _convert_elsewhere(
    work: Workspace, part: str, plan: Plan, standing: Standing, run: Execution, cluster: Cluster
) -> Manifest:
    """Have the shards of a part made, and write its manifest."""
    directory, listener, transport = work.directory / part, run.listener, run.transport
    collected = Collected(plan, standing)
    uploads: dict[str, Upload] = {}

    def take(task: MakeFile, made: Made) -> None:
        for name, digests in made.sources.items():
            work.journal.source_file(part, name, digests)
        for tensor, result in collected.add(task.unit, made):
            outputs = {key: collected.tensors[key] for key in tensor.outputs}
            path = None if transport.leaving else directory / plan.shards[tensor.file].filename
            work.journal.weight(part, tensor.name, result, outputs, path)
            listener.tensor(part, tensor, result)
        for layout in task.unit.plan.shards:
            listener.file(part, layout.filename, layout.size)
        if made.upload is not None:
            uploads[task.name] = made.upload
            transport.uploaded(path_in_model(part, task.name), made.upload)
        if transport.leaving:  # an upload is of use when all that is in it is known
            for name in collected.whole(uploads):
                work.journal.uploaded(part, name, uploads.pop(name))

    units = cut(plan, standing)
    with transport.elsewhere(plan, part, units, directory, run.digest, run.fsync) as means:
        tasks = [MakeFile(unit, means.place, means.sources) for unit in units]
        cluster.do(tasks, means.check, take, listener.progress, means.moved)
        if means.shared:
            require_unchanged(plan.checkpoint.shards)
    manifest = manifest_of(
        plan, run.digest, collected.results, collected.sources, collected.tensors
    )
    return _write_manifest(directory, plan, manifest, collected.shards)


def _write_manifest(
    directory: Path, plan: Plan, manifest: Manifest, digests: Mapping[str, str]
) -> Manifest:
    """Write a part's manifest, and return it.

    Args:
        manifest: without its list of output files.
        digests: of the shards, by name.
    """
    shards = {layout.filename: layout.size for layout in plan.shards}
    records = {name: FileRecord(size, digests[name]) for name, size in shards.items()}
    manifest = replace(manifest, output_files=file_records(directory, manifest.digest, records))
    with (directory / MANIFEST).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(manifest.pieces())
    return manifest


def _copy(
    work: Workspace, model: ModelPlan, carriage: Carriage, algorithm: str
) -> dict[str, FileRecord]:
    """Write the files of a pipeline that lie beside its converted components.

    Returns:
        Size and digest of each file that holds weights, by its path.  The file itself may have
        been taken away.
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
    """Write nf4_pipeline.json.

    Args:
        copied: what `_copy` returns.
    """
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
