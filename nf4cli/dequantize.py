"""A bitsandbytes 4-bit checkpoint, anybody's, back to an ordinary one, streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import selection, stopping
from .engines import Engine
from .errors import InputError, NonFiniteError, UsageError
from .limits import Resources, refuse_place, require_disk
from .model_config import set_dtype
from .output import write_side_files
from .packed import PackedReader, PackedWeight, load_weights
from .pipeline import Progress, no_progress, run
from .plan import check_shard_size, index_of
from .reader import ShardReaders
from .records import ITEMSIZE, SAFETENSORS_NAME, TORCH_NAME, Checkpoint, TensorInfo
from .source import shard_name
from .workspace import Workspace
from .writer import ShardLayout, ShardWriter, fill_shards, lay_out

if TYPE_CHECKING:
    from .engines import U8


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor of the output: decoded from `weight`, or kept from `source`."""

    source: TensorInfo
    weight: PackedWeight | None
    transposed: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return TensorInfo(self.source.name, self.dtype, self.shape, 0).nbytes


@dataclass(frozen=True, slots=True)
class _Item:
    """Elements [start, start + count) of an output, in the order they are stored in the source."""

    output: _Output
    start: int
    count: int


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


@dataclass(frozen=True, slots=True)
class Decoding:
    """A checkpoint that will be decoded: everything is known but the values.

    Attributes:
        config: the new config.json.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, PackedWeight]
    outputs: tuple[_Output, ...]
    layouts: tuple[ShardLayout, ...]
    file_of: Mapping[str, int]
    config: Mapping[str, Any]

    @property
    def shard_bytes(self) -> int:
        """Bytes of all output shards."""
        return sum(layout.size for layout in self.layouts)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the whole output."""
        root = self.checkpoint.root
        return self.shard_bytes + sum(
            (root / name).stat().st_size for name in self.checkpoint.extra_files
        )


def write_dequantized(
    checkpoint: Checkpoint,
    output: Path,
    engine: Engine,
    resources: Resources,
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
    fsync: bool = True,
    progress: Progress = no_progress,
) -> Summary:
    """Decode every packed weight of `checkpoint` into the new directory `output`.

    Args:
        dtype: of every floating tensor written; "auto" leaves each weight the dtype that its
            quantization state names, and kept tensors theirs.

    Raises:
        InputError: not a bitsandbytes 4-bit checkpoint, or a damaged one.
        UsageError, MachineError: `output` exists, lies in the source, or does not fit.
        OSError: a disk is full or fails.
    """
    refuse_place(checkpoint.root, output, checkpoint.is_file)
    decoding = plan_decoding(checkpoint, engine, dtype, max_shard_size)
    require_disk(output, decoding.disk_bytes)
    place = checkpoint.root, checkpoint.is_file
    with stopping.finishing(), Workspace(output, place, fsync=fsync) as work:
        return decode_into(decoding, work.directory, engine, resources, progress)


def plan_decoding(
    checkpoint: Checkpoint, engine: Engine, dtype: str, max_shard_size: int
) -> Decoding:
    """Read every state and lay the output out; see `write_dequantized`."""
    if dtype not in ("auto", *SAFETENSORS_NAME):
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(SAFETENSORS_NAME)}")
    check_shard_size(max_shard_size)
    with ShardReaders(checkpoint.shards) as readers:
        weights = load_weights(checkpoint, readers)
        packed = PackedReader(readers, engine)
        for weight in weights.values():
            packed.require_standard_table(weight)
    outputs = _outputs(checkpoint, weights, dtype)
    layouts, file_of = _lay_out(outputs, checkpoint.stem, max_shard_size)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if config and dtype != "auto":
        set_dtype(config, dtype)
    return Decoding(checkpoint, weights, tuple(outputs), tuple(layouts), file_of, config)


def decode_into(
    decoding: Decoding, directory: Path, engine: Engine, resources: Resources, progress: Progress
) -> Summary:
    """Decode into an empty directory, which the caller removes on any failure."""
    checkpoint, outputs, layouts = decoding.checkpoint, decoding.outputs, decoding.layouts
    write_side_files(directory, checkpoint, decoding.config, index_of(layouts))
    writers: list[ShardWriter] = []
    with ShardReaders(checkpoint.shards) as readers:
        packed = PackedReader(readers, engine)
        try:
            writers += (ShardWriter(directory, layout) for layout in layouts)

            def make_worker() -> Callable[[_Item], None]:
                buffers = engine.buffer(resources.chunk), engine.buffer(resources.chunk)

                def worker(item: _Item) -> None:
                    writer = writers[decoding.file_of[item.output.source.name]]
                    _convert(item, checkpoint, packed, engine, writer, buffers)
                    progress(item.output.source.name, item.count * ITEMSIZE[item.output.dtype])

                return worker

            items = _items(outputs, resources.chunk)
            run(items, make_worker, resources.workers, lambda: None)
            for writer in writers:
                writer.finish()
        finally:
            for writer in writers:
                writer.close()
    decoded = len(decoding.weights)
    return Summary(decoded, len(outputs) - decoded, decoding.shard_bytes, len(layouts))


def _outputs(checkpoint: Checkpoint, weights: dict[str, PackedWeight], dtype: str) -> list[_Output]:
    model_types = selection.Context.of(checkpoint).model_types
    companions = {part[1].name for w in weights.values() for part in w.parts()[1:]}
    outputs = []
    for name, (_, tensor) in checkpoint.tensors.items():
        if name in companions:
            continue
        weight = weights.get(name)
        if weight is None:
            kept = tensor.dtype
            if tensor.dtype in TORCH_NAME and dtype != "auto":
                kept = SAFETENSORS_NAME[dtype]
            outputs.append(_Output(tensor, None, False, kept, tensor.shape))
            continue
        wanted = SAFETENSORS_NAME[weight.state.dtype if dtype == "auto" else dtype]
        leaf = selection.module_path(name).rpartition(".")[2]
        transposed = len(weight.state.shape) == 2 and selection.is_transposed(model_types, leaf)
        shape = weight.state.shape[::-1] if transposed else weight.state.shape
        outputs.append(_Output(tensor, weight, transposed, wanted, shape))
    return outputs


def _lay_out(
    outputs: list[_Output], stem: str, max_shard_size: int
) -> tuple[list[ShardLayout], dict[str, int]]:
    files = fill_shards(
        outputs, lambda output: [(output.source.name, output.dtype, output.shape)], max_shard_size
    )
    layouts = [
        lay_out(
            shard_name(stem, number, len(files)),
            [(o.source.name, o.dtype, o.shape) for o in members],
            (),
        )
        for number, members in enumerate(files)
    ]
    return layouts, {o.source.name: i for i, members in enumerate(files) for o in members}


def _items(outputs: Sequence[_Output], chunk: int) -> Iterator[_Item]:
    for output in outputs:
        n = TensorInfo("", "U8", output.shape, 0).numel
        width = max(ITEMSIZE[output.dtype], ITEMSIZE[output.source.dtype])
        # Chunks start at a block's first element; a transposed one also at a row's.
        unit = output.weight.state.blocksize if output.weight else 1
        if output.transposed:
            row = output.shape[0]
            unit = unit // gcd(unit, row) * row
        step = max(unit, chunk // width // unit * unit)
        for start in range(0, n, step):
            yield _Item(output, start, min(step, n - start))


def _convert(
    item: _Item,
    checkpoint: Checkpoint,
    packed: PackedReader,
    engine: Engine,
    writer: ShardWriter,
    buffers: tuple[U8, U8],
) -> None:
    output = item.output
    name, itemsize = output.source.name, ITEMSIZE[output.dtype]
    if output.weight is None:
        width = ITEMSIZE[output.source.dtype]
        data = buffers[0][: item.count * width]
        packed.read_into(checkpoint.tensors[name], item.start * width, data)
        if output.dtype != output.source.dtype:
            out = buffers[1][: item.count * itemsize]
            try:
                engine.cast(data, output.source.dtype, out, output.dtype)
            except NonFiniteError as error:
                raise InputError(
                    f"{name} holds a value too large for {output.dtype}: choose another --dtype"
                ) from error
            data = out
        writer.write(name, item.start * itemsize, data)
        return
    fits = item.count * itemsize <= buffers[1].nbytes  # an item of a large unit may not
    data = packed.decode(
        output.weight, item.start, item.count, output.dtype, *(buffers if fits else ())
    )
    if not output.transposed:
        writer.write(name, item.start * itemsize, data)
        return
    # Rows [first, last) of the decoded matrix are columns of the stored one.
    rows, columns = output.shape
    first, last = item.start // rows, (item.start + item.count) // rows
    block = np.ascontiguousarray(data.view(f"u{itemsize}").reshape(last - first, rows).T)
    raw = block.view(np.uint8)
    if last - first == columns:
        writer.write(name, 0, raw.reshape(-1))
        return
    for row in range(rows):
        writer.write(name, (row * columns + first) * itemsize, raw[row])
