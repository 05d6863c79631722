"""A bitsandbytes 4-bit model, anybody's, back to an ordinary one, streaming."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import stopping
from ..callbacks import Progress, no_progress
from ..checkpoint.discovery import name_of_directory, open_checkpoint, shard_name
from ..checkpoint.packed import PackedReader, PackedWeight, load_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint, FileDigests, Shard, TensorInfo, View, Weight
from ..checkpoint.writer import ShardLayout, ShardWriter, fill_shards, lay_out
from ..engines.protocol import Engine
from ..errors import InputError, UsageError
from ..format.config import QuantConfig
from ..format.dtypes import SAFETENSORS_NAME, TORCH_NAME
from ..output.manifest import Result
from ..planning import selection
from ..planning.make_plan import check_shard_size, index_of
from ..planning.model_config import set_dtype
from ..planning.model_plan import ModelPlan
from ..planning.pipeline_plan import components_of, copies_of, is_pipeline, packed_components
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import Resources
from .conversion import Conversion
from .output_place import refuse_place, require_disk
from .side_files import write_side_files
from .workspace import Workspace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written.

    Attributes:
        decoded: packed weights that became floats.
        kept: tensors copied or cast.
        nbytes: of all output shards.
        files: output shards.
    """

    decoded: int
    kept: int
    nbytes: int
    files: int

    @staticmethod
    def of(plan: Plan) -> Summary:
        """Return what a plan that was carried out has written."""
        decoded = sum(t.packed is not None for t in plan.tensors)
        kept = len(plan.tensors) - decoded
        return Summary(decoded, kept, plan.shard_bytes, len(plan.shards))


class _Files:
    """The sink that writes into a directory, and digests nothing."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._writers = [ShardWriter(directory, layout) for layout in plan.shards]
        self._of = {t.name: self._writers[t.file] for t in plan.tensors}

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        self._of[key].write(key, offset, data)

    def finish(self, plan: TensorPlan, result: Result) -> None: ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None: ...

    def abort(self) -> None: ...

    def finish_files(self) -> None:
        """Have the safetensors library open each file."""
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
) -> dict[str, Summary]:
    """Decode into the new directory `output`, which appears complete or not at all.

    Args:
        model: of `plan_decoding`.

    Returns:
        What was written, by part.

    Raises:
        UsageError, MachineError: `output` exists, lies in the source, or does not fit.
        InputError: a scale is too large for the dtype, or a source file changed.
        OSError: a disk is full or fails.
    """
    refuse_place(model.root, output, model.is_file)
    beside = (
        (plan.checkpoint.root / name).stat().st_size
        for plan in model.parts.values()
        for name in plan.checkpoint.extra_files
    )
    require_disk(output, model.copies.nbytes + model.shard_bytes + sum(beside))
    place = model.root, model.is_file
    with stopping.finishing(), Workspace(output, place, fsync=fsync) as work:
        model.copies.write(work.directory)
        for part, plan in model.parts.items():
            directory = work.directory / part
            directory.mkdir(exist_ok=True)
            _decode_into(directory, plan, engine, resources, progress)
    return {part: Summary.of(plan) for part, plan in model.parts.items()}


def _decode_into(
    directory: Path, plan: Plan, engine: Engine, resources: Resources, progress: Progress
) -> None:
    write_side_files(directory, plan.checkpoint, plan.output_config, plan.index)
    with ExitStack() as stack:
        readers = stack.enter_context(ShardReaders(plan.checkpoint.shards))
        files = _Files(directory, plan)
        stack.callback(files.close)
        Conversion(
            plan, engine, resources, files, None, progress=progress,
            packed=PackedReader(readers, engine),
        ).run()  # fmt: skip
        files.finish_files()


def plan_decoding(
    path: Path, engine: Engine, dtype: str = "auto", max_shard_size: int = 5_000_000_000
) -> ModelPlan:
    """Decide how every packed weight of a checkpoint or pipeline is decoded.

    Args:
        dtype: of every floating tensor written; "auto" leaves each weight the dtype that its
            quantization state names, and kept tensors theirs.

    Raises:
        UsageError: no such dtype.
        InputError: nothing there is a bitsandbytes 4-bit checkpoint, or one is damaged.
    """
    if dtype not in ("auto", *SAFETENSORS_NAME):
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(SAFETENSORS_NAME)}")
    check_shard_size(max_shard_size)
    if not is_pipeline(path):
        checkpoint = open_checkpoint(path)
        return ModelPlan.of(_plan(checkpoint, engine, dtype, max_shard_size))
    components = components_of(path)
    packed = packed_components(path, components)
    if not packed:
        raise InputError(
            f"{path} has no component with bitsandbytes 4-bit weights: there is nothing to decode"
        )
    parts = {
        name: _plan(open_checkpoint(path / name), engine, dtype, max_shard_size) for name in packed
    }
    copies = copies_of(path, components, parts)
    return ModelPlan(path, False, name_of_directory(path), parts, copies, ())


def _plan(checkpoint: Checkpoint, engine: Engine, dtype: str, max_shard_size: int) -> Plan:
    """Read every state of a checkpoint and lay the output out."""
    with ShardReaders(checkpoint.shards) as readers:
        weights = load_weights(checkpoint, readers)
        packed = PackedReader(readers, engine)
        for weight in weights.values():
            packed.require_standard_table(weight)
    tensors, layouts = _lay_out(
        _tensor_plans(checkpoint, weights, dtype), checkpoint.stem, max_shard_size
    )
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if config and dtype != "auto":
        set_dtype(config, dtype)
    return Plan(
        checkpoint, QuantConfig(dtype=dtype, max_shard_size=max_shard_size), tensors, layouts,
        index_of(layouts), config, (),
    )  # fmt: skip


def _tensor_plans(
    checkpoint: Checkpoint, weights: Mapping[str, PackedWeight], dtype: str
) -> list[TensorPlan]:
    model_types = selection.Context.of(checkpoint).model_types
    companions = {part[1].name for w in weights.values() for part in w.parts()[1:]}
    plans = []
    for name, (shard, stored) in checkpoint.tensors.items():
        if name in companions:
            continue
        weight = weights.get(name)
        if weight is None:
            plans.append(_kept(shard, stored, dtype))
            continue
        wanted = SAFETENSORS_NAME[weight.state.dtype if dtype == "auto" else dtype]
        shape = tuple(weight.state.shape)
        leaf = selection.module_path(name).rpartition(".")[2]
        view = None
        if len(shape) == 2 and selection.is_transposed(model_types, leaf):
            view = View(0, *shape, stride=shape[1])
            shape = shape[::-1]
        made = Weight(name, wanted, shape, shard, stored)
        plans.append(
            TensorPlan(
                made, "decode", "packed", "", view, None, {name: (wanted, shape)}, packed=weight
            )
        )
    return plans


def _kept(shard: Shard, stored: TensorInfo, dtype: str) -> TensorPlan:
    """Return the plan of a tensor that is not packed."""
    wanted = stored.dtype
    if stored.dtype in TORCH_NAME and dtype != "auto":
        wanted = SAFETENSORS_NAME[dtype]
    action = "copy" if wanted == stored.dtype else "cast"
    weight = Weight(stored.name, stored.dtype, stored.shape, shard, stored)
    return TensorPlan(weight, action, "kept", "", None, None, {stored.name: (wanted, stored.shape)})


def _lay_out(
    plans: list[TensorPlan], stem: str, max_shard_size: int
) -> tuple[tuple[TensorPlan, ...], tuple[ShardLayout, ...]]:
    """Return the plans in the order they are read, each with its file, and the files."""
    files = fill_shards(
        plans,
        lambda plan: [(key, dtype, shape) for key, (dtype, shape) in plan.outputs.items()],
        max_shard_size,
    )
    layouts = tuple(
        lay_out(
            shard_name(stem, number, len(files)),
            [(t.name, *t.outputs[t.name]) for t in members],
            (),
        )
        for number, members in enumerate(files)
    )
    file_of = {t.name: number for number, members in enumerate(files) for t in members}
    placed = (replace(t, file=file_of[t.name]) for t in plans)
    return tuple(
        sorted(placed, key=lambda t: (t.weight.shard.path.name, t.weight.stored.start))
    ), layouts
