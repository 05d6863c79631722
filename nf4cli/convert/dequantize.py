"""Decode a bitsandbytes 4-bit model, whoever wrote it, back to an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import stopping
from ..callbacks import Progress, no_progress
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.discovery import (
    MANIFEST,
    WEIGHTS_KEY,
    name_of_directory,
    open_checkpoint,
    shard_name,
)
from ..checkpoint.model_files import never_kind
from ..checkpoint.packed import PackedReader, PackedWeight, load_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint, FileDigests, Region, Shard, TensorInfo, View, Weight
from ..checkpoint.untrusted import is_regular
from ..checkpoint.writer import ShardLayout, ShardWriter, fill_shards, lay_out
from ..engines.protocol import Engine
from ..errors import InputError, UsageError
from ..format.config import QuantConfig
from ..format.dtypes import FLOAT64, SAFETENSORS_NAME, TORCH_NAME
from ..output.manifest import Manifest, Result, TensorRecord
from ..output.pipeline_record import read_record
from ..output.recorded_choices import copied_names, matrices_of
from ..output.report import Report
from ..planning import selection, ties
from ..planning.families import names_of
from ..planning.make_plan import index_of, source_file
from ..planning.merging import merged
from ..planning.model_config import set_dtype
from ..planning.model_plan import ModelPlan
from ..planning.notes import merging_notes
from ..planning.options import check_shard_size
from ..planning.pipeline_plan import components_of, copies_of, is_pipeline, packed_components
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import Resources
from ..planning.weights import ROUTER, regions
from .conversion import Conversion, Tools
from .make_units import SharedPlace, place_for_units
from .output_place import refuse_place, require_disk
from .resume import Standing
from .side_files import write_side_files
from .tasks import Cluster, SeesFiles
from .transfers import Transfers
from .units import UnitTask, cut, require_unchanged, source_files
from .workspace import Workspace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written of one checkpoint.

    Attributes:
        decoded: number of packed weights that became floats.
        kept: number of tensors that were copied or cast.
        nbytes: bytes of all output shards.
        files: number of output shards.
    """

    decoded: int
    kept: int
    nbytes: int
    files: int

    @staticmethod
    def of(plan: Plan) -> Summary:
        """Return the summary of a plan that was carried out."""
        decoded = sum(t.packed is not None for t in plan.tensors)
        kept = len(plan.tensors) - decoded
        return Summary(decoded, kept, plan.shard_bytes, len(plan.shards))


class _Files:
    """The sink that writes shards into a directory, and digests nothing."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._writers = [ShardWriter(directory, layout) for layout in plan.shards]
        self._of = {t.key: self._writers[t.file] for t in plan.tensors}

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        self._of[key].write(key, offset, data)

    def finish(self, plan: TensorPlan, result: Result) -> None: ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None: ...

    def abort(self) -> None: ...

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [writer.path for writer in self._writers]

    def finish_files(self) -> None:
        """Check each file with the safetensors library."""
        for writer in self._writers:
            writer.finish()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def write_decoded(
    model: ModelPlan,
    output: Path,
    engine: Engine,
    resources: Resources,
    fsync: bool = True,
    progress: Progress = no_progress,
    cluster: Cluster | None = None,
) -> dict[str, Summary]:
    """Decode a model into the new directory `output`, which appears complete or not at all.

    Args:
        model: what `plan_decoding` returns.
        fsync: wait for the disk before the output appears.
        progress: told the bytes of each tensor that are done.
        cluster: writes the files; None to write them here.

    Returns:
        What was written, by part.

    Raises:
        UsageError, MachineError: `output` exists, lies in the source, or does not fit.
        InputError: a scale is too large for the dtype, or a source file changed.
        OSError: a disk is full or fails.
    """
    refuse_place(model.root, output, model.is_file)
    side_bytes = sum(
        (plan.checkpoint.root / name).stat().st_size
        for plan in model.parts.values()
        for name in plan.checkpoint.extra_files
    )
    require_disk(output, model.copies.nbytes + model.shard_bytes + side_bytes)
    source = model.root, model.is_file
    with stopping.finishing(), Workspace(output, source, fsync=fsync) as work:
        model.copies.write(work.directory)
        for part, plan in model.parts.items():
            directory = work.directory / part
            directory.mkdir(exist_ok=True)
            write_side_files(directory, plan.checkpoint, plan.output_config, plan.index)
            if cluster is None:
                _decode_into(directory, plan, Tools(engine, resources, progress))
            else:
                _decode_on_nodes(cluster, directory, plan, fsync, progress)
    return {part: Summary.of(plan) for part, plan in model.parts.items()}


def _decode_into(directory: Path, plan: Plan, tools: Tools) -> list[Path]:
    """Write the decoded shards of one plan into `directory`, and return their paths."""
    with ExitStack() as stack:
        readers = stack.enter_context(ShardReaders(plan.checkpoint.shards))
        files = _Files(directory, plan)
        stack.callback(files.close)
        Conversion(plan, tools, files, packed=PackedReader(readers, tools.engine)).run()
        files.finish_files()
        return files.paths


@dataclass(frozen=True, slots=True)
class DecodeFile(UnitTask):
    """The `Task` that writes one decoded file; all weights of its unit are made, none is digested.

    Attributes:
        place: takes the file.
    """

    place: SharedPlace

    def do(self, tools: Tools, moved: Transfers) -> None:
        with self.place.aside() as aside:
            for path in _decode_into(aside, self.unit.plan, tools):
                self.place.take(path, "", moved)


def _decode_on_nodes(
    cluster: Cluster, directory: Path, plan: Plan, fsync: bool, progress: Progress
) -> None:
    """Have the decoded shards of one plan written into `directory`."""
    nothing_to_digest = {shard.path.name: FileDigests("", {}) for shard in plan.checkpoint.shards}
    units = cut(plan, Standing(sources=nothing_to_digest))
    with place_for_units(directory, "", fsync) as place:
        check = SeesFiles(source_files(units), place.tries)
        tasks = [DecodeFile(unit, place) for unit in units]
        cluster.do(tasks, check, lambda task, made: None, progress)
        require_unchanged(plan.checkpoint.shards)


def plan_decoding(
    path: Path,
    engine: Engine,
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
    merging: Sequence[Adapter] = (),
) -> ModelPlan:
    """Decide how every packed weight of a checkpoint or pipeline is decoded.

    Args:
        path: the checkpoint or pipeline.
        engine: decodes the quantization states.
        dtype: of every floating tensor written; "auto" gives each packed weight the dtype that its
            quantization state names, and leaves kept tensors theirs.
        max_shard_size: bytes of an output file.
        merging: adapters that are merged into the decoded weights, in order.

    Raises:
        UsageError: no such dtype, or `max_shard_size` is out of range.
        InputError: `path` holds no bitsandbytes 4-bit weight, or a checkpoint is damaged.
    """
    if dtype not in ("auto", *SAFETENSORS_NAME):
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(SAFETENSORS_NAME)}")
    check_shard_size(max_shard_size)
    if not is_pipeline(path):
        checkpoint = _with_recorded(open_checkpoint(path))
        return ModelPlan.of(_plan(checkpoint, engine, dtype, max_shard_size, merging))
    if merging:
        raise UsageError(
            f"--adapter is for a checkpoint of one model, and {path} is a pipeline: give the "
            "directory of one component"
        )
    components = components_of(path)
    packed = packed_components(path, components)
    if not packed:
        raise InputError(
            f"{path} has no component with bitsandbytes 4-bit weights: there is nothing to decode"
        )
    parts = {
        name: _plan(_with_recorded(open_checkpoint(path / name)), engine, dtype, max_shard_size)
        for name in packed
    }
    record = read_record(path, Report())  # a damaged one is for nf4 verify to report
    recorded = [name for name in (record.files if record else ()) if not never_kind(name)]
    copies = copies_of(path, components, parts, recorded)
    return ModelPlan(path, False, name_of_directory(path), parts, copies, ())


def _with_recorded(checkpoint: Checkpoint) -> Checkpoint:
    """Return an output with the files to copy that its run was told to copy, by its manifest."""
    place = checkpoint.root / MANIFEST
    if checkpoint.is_file or not is_regular(place):
        return checkpoint
    try:
        names = copied_names(Manifest.from_file(place))
    except InputError:  # damaged, which nf4 verify reports
        return checkpoint
    left = {name for name in checkpoint.left_files if is_regular(checkpoint.root / name)}
    return checkpoint.with_extra({name for name in names & left if not never_kind(name)})


def _plan(
    checkpoint: Checkpoint,
    engine: Engine,
    dtype: str,
    max_shard_size: int,
    merging: Sequence[Adapter] = (),
) -> Plan:
    """Return the plan that decodes one checkpoint."""
    with ShardReaders(checkpoint.shards) as readers:
        weights = load_weights(checkpoint, readers)
        packed = PackedReader(readers, engine)
        for weight in weights.values():
            packed.require_standard_table(weight)
    plans = _tensor_plans(checkpoint, weights, dtype)
    names = names_of(checkpoint.config)
    tied = ties.absent_tied(checkpoint.config, None, [t.name for t in plans], names)
    plans = merged(plans, merging, selection.Context.of(checkpoint).model_types, tied)
    tensors, layouts = _lay_out(plans, checkpoint.stem, max_shard_size)
    left = ("quantization_config", WEIGHTS_KEY)
    config = {k: v for k, v in checkpoint.config.items() if k not in left}
    if config and dtype != "auto":
        set_dtype(config, dtype)
    plan = Plan(
        checkpoint, QuantConfig(dtype=dtype, max_shard_size=max_shard_size), tensors, layouts,
        index_of(layouts), config, (),
    )  # fmt: skip
    return replace(plan, notes=tuple(merging_notes(plan, merging)))


@dataclass(frozen=True, slots=True)
class _WayBack:
    """How the weights of a 4-bit checkpoint lie in its source.

    Attributes:
        regions: name -> place in a fused tensor, of those that were a part of one.
        transposed: names of the packed weights whose source is stored as [in, out] (Conv1D).
        renamed: name -> name in the source, of what unsloth calls otherwise.
        stacks: name of a packed stack of experts -> (name, shape) of each matrix in it, in order.
            A stack without a record stays one: transformers 5 loads it so.
    """

    regions: Mapping[str, Region]
    transposed: frozenset[str]
    renamed: Mapping[str, str]
    stacks: Mapping[str, list[tuple[str, tuple[int, ...]]]]

    @staticmethod
    def of(
        checkpoint: Checkpoint,
        weights: Mapping[str, PackedWeight],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> _WayBack:
        """Return what the manifest records of each weight, and else what its family's rules say.

        Args:
            weights: the packed ones, by name.
            shapes: name -> shape of each weight, packed or not.

        Raises:
            InputError: see `weights.regions`.
        """
        records = _records(checkpoint)
        alone = {name for name, record in records.items() if record.source_tensor == name}
        parts = {name: shape for name, shape in shapes.items() if name not in alone}
        model_types = selection.Context.of(checkpoint).model_types

        def is_transposed(name: str) -> bool:
            if name in alone:
                return records[name].transposed
            return selection.is_transposed(
                model_types, selection.module_path(name).rpartition(".")[2]
            )

        places = regions(checkpoint.config, parts, str(checkpoint.root))
        for region in places.values():
            if region.key in checkpoint.tensors:
                raise InputError(
                    f"{checkpoint.root} holds {region.key} and the matrices of experts that it is "
                    "made of: expected one or the other. Download the checkpoint again"
                )
        matrices = (name for name, shape in shapes.items() if len(shape) == 2)
        return _WayBack(
            places,
            frozenset(filter(is_transposed, matrices)),
            {n: n.replace(*ROUTER[::-1]) for n in shapes if places and ROUTER[1] in n},
            {
                name: members
                for name, weight in weights.items()
                if name in records and (members := matrices_of(weight, records[name]))
            },
        )


def _records(checkpoint: Checkpoint) -> Mapping[str, TensorRecord]:
    """Return the manifest's record of each weight, {} where no manifest can be read.

    A damaged one is no reason to refuse: the weights are whole, and the rules say the same.
    """
    with suppress(InputError, OSError):
        if not checkpoint.is_file:
            return Manifest.from_file(checkpoint.root / MANIFEST).tensors
    return {}


def _tensor_plans(
    checkpoint: Checkpoint, weights: Mapping[str, PackedWeight], dtype: str
) -> list[TensorPlan]:
    """Return the plan of each weight, in the order of the checkpoint's tensors.

    Raises:
        InputError: an output tensor cannot be put together, see `weights.regions`.
    """
    companions = {part[1].name for w in weights.values() for part in w.parts()[1:]}
    stored = {k: placed for k, placed in checkpoint.tensors.items() if k not in companions}
    shapes = {
        name: tuple(weights[name].state.shape) if name in weights else tensor.shape
        for name, (_, tensor) in stored.items()
    }
    way_back = _WayBack.of(checkpoint, weights, shapes)
    plans: list[TensorPlan] = []
    for name, (shard, tensor) in stored.items():
        if name in way_back.stacks:
            plans += _matrices(shard, tensor, weights[name], dtype, way_back.stacks[name])
        elif name in weights:
            transposed = name in way_back.transposed
            plans.append(_decoded(shard, tensor, weights[name], dtype, transposed))
        else:
            plans.append(_kept(shard, tensor, dtype, way_back.renamed.get(name, name)))
    return list(_put_together(plans, way_back.regions))


def _decoded(
    shard: Shard, stored: TensorInfo, packed: PackedWeight, dtype: str, transposed: bool
) -> TensorPlan:
    """Return the plan of a packed weight.

    Args:
        transposed: whether the output has the transpose of what the codes decode to.
    """
    output_dtype = SAFETENSORS_NAME[packed.state.dtype if dtype == "auto" else dtype]
    shape = tuple(packed.state.shape)
    weight = Weight(packed.name, output_dtype, shape, shard, stored)
    outputs = {packed.name: (output_dtype, shape)}
    plan = TensorPlan(weight, "decode", "packed", "", None, None, outputs, packed=packed)
    return _transposed(plan) if transposed else plan


def _matrices(
    shard: Shard,
    stored: TensorInfo,
    packed: PackedWeight,
    dtype: str,
    members: list[tuple[str, tuple[int, ...]]],
) -> Iterator[TensorPlan]:
    """Yield the plan of each matrix of a packed stack of experts.

    Args:
        members: (name, shape) of each, in the order of the stack.
    """
    output_dtype = SAFETENSORS_NAME[packed.state.dtype if dtype == "auto" else dtype]
    first = 0
    for name, shape in members:
        weight = Weight(name, output_dtype, shape, shard, stored)
        yield TensorPlan(
            weight, "decode", "packed", "", None, None, {name: (output_dtype, shape)},
            packed=packed, packed_start=first,
        )  # fmt: skip
        first += weight.numel


def _kept(shard: Shard, stored: TensorInfo, dtype: str, name: str) -> TensorPlan:
    """Return the plan of a tensor that is not packed.

    Args:
        name: of the output.
    """
    output_dtype = stored.dtype
    if stored.dtype in (*TORCH_NAME, FLOAT64) and dtype != "auto":
        output_dtype = SAFETENSORS_NAME[dtype]
    weight = Weight(name, stored.dtype, stored.shape, shard, stored)
    outputs = {name: (output_dtype, stored.shape)}
    return TensorPlan(weight, _keeping(weight, output_dtype), "kept", "", None, None, outputs)


def _keeping(weight: Weight, output_dtype: str) -> str:
    return "copy" if output_dtype == weight.stored.dtype else "cast"


def _transposed(plan: TensorPlan) -> TensorPlan:
    """Return a matrix's plan with the transpose of the matrix as output."""
    rows, columns = plan.weight.shape
    weight = replace(plan.weight, shape=(columns, rows))
    outputs = {name: (dtype, (columns, rows)) for name, (dtype, _) in plan.outputs.items()}
    return replace(plan, weight=weight, view=View(0, rows, columns, columns), outputs=outputs)


def _put_together(plans: list[TensorPlan], places: Mapping[str, Region]) -> Iterator[TensorPlan]:
    """Yield the plans, with those of matrices that make up one output tensor changed for that.

    Such a tensor has the dtype of its matrices, float32 where they differ: it holds all of them.

    Args:
        places: by name of a matrix.
    """
    dtypes: dict[str, set[str]] = {}
    for plan in plans:
        if region := places.get(plan.name):
            dtypes.setdefault(region.key, set()).add(plan.outputs[plan.name][0])
    for plan in plans:
        region = places.get(plan.name)
        if region is None:
            yield plan
            continue
        of_parts = dtypes[region.key]
        dtype = next(iter(of_parts)) if len(of_parts) == 1 else "F32"
        action = plan.action if plan.packed else _keeping(plan.weight, dtype)
        changed = replace(
            plan, action=action, region=region, outputs={plan.name: (dtype, plan.weight.shape)}
        )
        yield changed if len(plan.weight.shape) == 1 else _transposed(changed)


def _lay_out(
    plans: list[TensorPlan], stem: str, max_shard_size: int
) -> tuple[tuple[TensorPlan, ...], tuple[ShardLayout, ...]]:
    """Lay the output tensors out in files.

    Returns:
        (the plans in the order of reading, each with the number of its file, the files).
    """
    tensors: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    read_from = {}
    for plan in plans:
        dtype, shape = plan.outputs[plan.name]
        tensors[plan.key] = (plan.key, dtype, plan.region.shape if plan.region else shape)
        read_from[plan.key] = source_file(plan)
    files = fill_shards(
        tensors.values(), lambda tensor: [tensor], max_shard_size, lambda t: read_from[t[0]]
    )
    layouts = tuple(
        lay_out(shard_name(stem, number, len(files)), members, ())
        for number, members in enumerate(files)
    )
    file_of = {key: number for number, members in enumerate(files) for key, _, _ in members}
    placed = (replace(t, file=file_of[t.key]) for t in plans)
    return tuple(
        sorted(placed, key=lambda t: (t.weight.shard.path.name, t.weight.stored.start))
    ), layouts
