"""Show what a checkpoint holds, from headers and states alone, and one tensor in depth, from its
bytes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint import bnb_format
from ..checkpoint.discovery import MANIFEST
from ..checkpoint.packed import PackedReader, PackedWeight, find_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import is_regular
from ..engines.protocol import Engine
from ..errors import InputError, UsageError
from ..format.codebook import codebook
from ..format.dtypes import FLOAT8, FLOAT64, TORCH_NAME
from ..planning import encodings
from ..planning.encoded_weight import FLOAT8 as FLOAT8_FORMAT
from ..planning.encoded_weight import Found
from .manifest import Manifest, TensorError

if TYPE_CHECKING:
    from ..engines.protocol import F32

_PIECE = 1 << 20  # elements decoded or blocks read at a time
_BINS = 12


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one kind.

    Attributes:
        kind: "nf4, blocksize 64, nested, decodes to bfloat16", or a safetensors dtype.
        packed: whether they are 4-bit weights.
        tensors: how many there are; a packed weight with its companions counts once.
        elements: elements of all, of packed weights as they decode.
        nbytes: bytes of all, companions included.
        example: name of one of them.
    """

    kind: str
    packed: bool
    tensors: int
    elements: int
    nbytes: int
    example: str


@dataclass(frozen=True, slots=True)
class Overview:
    """A checkpoint at a glance.

    Attributes:
        name: what the user would call it.
        files: how many shards it has.
        nbytes: bytes of all shards.
        parameters: elements of all floating-point weights, of packed ones as they decode.
        quantized_parameters: those of them in 4 bit.
        bits_per_weight: bits of all tensors divided by `parameters`.
        groups: the packed ones first, both by bytes, the largest first.
        model_type: of config.json, or the class of a component of a diffusers pipeline.
        quant_method: of config.json, None where it says nothing.
        skip_modules: llm_int8_skip_modules.
        kept_modules: the entries of skip_modules that name a module of this checkpoint, each once,
            with `*` for the numbers of layers.
        errors: weight -> error of rounding, where a manifest has it.
        problems: what is wrong with incomplete states (`nf4 verify` checks more).
    """

    name: str
    files: int
    nbytes: int
    parameters: int
    quantized_parameters: int
    bits_per_weight: float
    groups: tuple[Group, ...]
    model_type: str | None
    quant_method: str | None
    skip_modules: tuple[str, ...]
    kept_modules: tuple[str, ...]
    errors: dict[str, TensorError]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor in depth.  `state` to `error` are for packed weights.

    Attributes:
        name: its key.
        file: name of the shard that it lies in.
        dtype: safetensors dtype.
        shape: as stored.
        nbytes: bytes of the tensor, of a packed weight with its companions.
        state: its quantization state.
        bits_per_weight: bits of the weight, companions included, divided by its elements.
        codes: how often each of the 16 codes occurs, by code.
        code_values: value that each code stands for.
        absmax_edges: 13 edges of 12 equal bins; two edges where all values are equal.
        absmax_counts: number of blocks in each bin.
        error: of rounding, where a manifest has it.
        reason: why it is packed or kept, where a manifest says so.
        owner: the packed weight that this tensor is a companion of, None for none.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    state: bnb_format.QuantState | None = None
    bits_per_weight: float = 0.0
    codes: tuple[int, ...] = ()
    code_values: tuple[float, ...] = ()
    absmax_edges: tuple[float, ...] = ()
    absmax_counts: tuple[int, ...] = ()
    error: TensorError | None = None
    reason: str | None = None
    owner: str | None = None


def overview(checkpoint: Checkpoint) -> Overview:
    """Return what headers, states, config.json and manifest say of a checkpoint."""
    with ShardReaders(checkpoint.shards) as readers:
        weights, problems = find_weights(checkpoint, readers)
    parts = {part[1].name for weight in weights.values() for part in weight.parts()}
    kinds: dict[tuple[str, bool], list[tuple[str, int, int]]] = {}
    for weight in weights.values():
        kinds.setdefault((_kind(weight), True), []).append(
            (weight.name, weight.numel, weight.nbytes)
        )
    encoded = _encoded(checkpoint)
    for name, found in encoded.weights.items():
        stored = [placed[1] for placed in (checkpoint.tensors[name], *found.encoding.companions)]
        kind = f"{found.encoding.format}, decodes to floats"
        kinds.setdefault((kind, False), []).append(
            (found.name(name), prod(found.shape), sum(t.nbytes for t in stored))
        )
    for name, (_, tensor) in checkpoint.tensors.items():
        if name not in parts and not encoded.knows(name):
            kinds.setdefault((tensor.dtype, False), []).append((name, tensor.numel, tensor.nbytes))
    groups = [
        Group(kind, packed, len(rows), sum(r[1] for r in rows), sum(r[2] for r in rows), rows[0][0])
        for (kind, packed), rows in kinds.items()
    ]
    floats = (*TORCH_NAME, *FLOAT8, FLOAT64)
    decoding = {f"{w.encoding.format}, decodes to floats" for w in encoded.weights.values()}
    parameters = sum(g.elements for g in groups if g.packed or g.kind in (*floats, *decoding))
    manifest = _manifest(checkpoint)
    model_type = checkpoint.config.get("model_type", checkpoint.config.get("_class_name"))
    return Overview(
        name=checkpoint.name,
        files=len(checkpoint.shards),
        nbytes=sum(shard.size for shard in checkpoint.shards),
        parameters=parameters,
        quantized_parameters=sum(g.elements for g in groups if g.packed),
        bits_per_weight=8 * sum(g.nbytes for g in groups) / max(1, parameters),
        groups=tuple(sorted(groups, key=lambda g: (not g.packed, -g.nbytes))),
        model_type=model_type if isinstance(model_type, str) else None,
        quant_method=bnb_format.quant_method(checkpoint.config),
        skip_modules=tuple(bnb_format.skip_list(checkpoint.config)),
        kept_modules=_kept_modules(checkpoint),
        errors={
            name: record.error
            for name, record in (manifest.tensors.items() if manifest else ())
            if record.error is not None
        },
        problems=tuple(problem for _, problem in problems),
    )


def _encoded(checkpoint: Checkpoint) -> Found:
    """Return the weights that are stored as codes, none where nf4 does not read them.

    Float8 is counted by its dtypes, which say enough.
    """
    try:
        found = encodings.find(checkpoint, requantize=True)
    except InputError:
        return Found()
    weights = {n: w for n, w in found.weights.items() if w.encoding.format != FLOAT8_FORMAT}
    parts = (placed[1].name for w in weights.values() for placed in w.encoding.companions)
    return Found(weights, dict.fromkeys(parts, "a part of a weight"))


def _kept_modules(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the entries of the skip list that name a module of this checkpoint, each once.

    Of entries that end alike only the shortest is given, with `*` for the numbers of layers.
    """
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    present = [
        key
        for key in bnb_format.skip_list(checkpoint.config)
        if any(f".{module}.".endswith(f".{key}.") for module in modules)
    ]
    shortest = [k for k in present if not any(k != o and k.endswith("." + o) for o in present)]
    numbered = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key) for key in shortest)
    return tuple(dict.fromkeys(numbered))


def _kind(weight: PackedWeight) -> str:
    """Return in words how a weight is packed."""
    state = weight.state
    storage = bnb_format.storage_of(weight.packed[1])
    return ", ".join(
        (
            state.quant_type,
            f"blocksize {state.blocksize}",
            "nested" if state.nested else "float32 absmax",
            *((f"stored as {storage}",) if storage != "uint8" else ()),
            f"decodes to {state.dtype}",
        )
    )


def _manifest(checkpoint: Checkpoint) -> Manifest | None:
    path = checkpoint.root / MANIFEST
    return Manifest.from_file(path) if is_regular(path) else None


def tensor_view(checkpoint: Checkpoint, name: str, engine: Engine) -> TensorView:
    """Return one tensor in depth, having read every byte of it.

    Args:
        name: its key, or the path of its module.
        engine: decodes the scales.

    Raises:
        UsageError: there is no such tensor.
        InputError: its quantization state is incomplete, or an absmax is not finite.
    """
    if name not in checkpoint.tensors and f"{name}.weight" in checkpoint.tensors:
        name = f"{name}.weight"
    if name not in checkpoint.tensors:
        near = [key for key in checkpoint.tensors if name in key and key.endswith(".weight")][:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"{checkpoint.root} has no tensor {name!r}{hint}")
    shard, tensor = checkpoint.tensors[name]
    manifest = _manifest(checkpoint)
    record = manifest.tensors.get(name) if manifest else None
    with ShardReaders(checkpoint.shards) as readers:
        weights, problems = find_weights(checkpoint, readers)
        weight = weights.get(name)
        if weight is None:
            for owner, problem in problems:
                if owner == name:
                    raise InputError(problem)
            return TensorView(
                name, shard.path.name, tensor.dtype, tensor.shape, tensor.nbytes,
                reason=record.reason if record else None,
                owner=bnb_format.companion_owner(name),
            )  # fmt: skip
        reader = PackedReader(readers, engine)
        codes = count_codes(reader, weight)
        edges, counts = _absmax_histogram(reader, weight)
    return TensorView(
        name=name,
        file=shard.path.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        nbytes=weight.nbytes,
        state=weight.state,
        bits_per_weight=8 * weight.nbytes / weight.numel,
        codes=codes,
        code_values=tuple(codebook(weight.state.quant_type).decode.tolist()),
        absmax_edges=edges,
        absmax_counts=counts,
        error=record.error if record else None,
        reason=record.reason if record else None,
    )


def count_codes(reader: PackedReader, weight: PackedWeight) -> tuple[int, ...]:
    """Return how often each of the 16 codes occurs in a packed weight."""
    pairs = np.zeros(256, np.int64)
    last = 0
    for start in range(0, weight.numel, _PIECE):
        data = reader.packed(weight, start, min(_PIECE, weight.numel - start))
        pairs += np.bincount(data, minlength=256)
        last = int(data[-1])
    table = pairs.reshape(16, 16)
    counts = table.sum(axis=1) + table.sum(axis=0)
    if weight.numel % 2:
        counts[last & 15] -= 1  # pads a weight with an odd number of elements
    return tuple(int(c) for c in counts)


def _absmax_histogram(
    reader: PackedReader, weight: PackedWeight
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return (edges, counts) of the histogram of a weight's absmax.

    The scales are read twice, piece by piece: for their range, and for the counts.
    """

    def pieces() -> list[tuple[int, int]]:
        return [(i, min(_PIECE, weight.blocks - i)) for i in range(0, weight.blocks, _PIECE)]

    def read(first: int, count: int) -> F32:
        return reader.absmax(weight, first, count)

    low = min(float(read(*piece).min()) for piece in pieces())
    high = max(float(read(*piece).max()) for piece in pieces())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{weight.name}: absmax is not finite; nf4 verify names the block")
    if high <= low:
        return (low, high), (weight.blocks,)
    counts: Counter[int] = Counter()
    edges = np.linspace(low, high, _BINS + 1)
    for piece in pieces():
        histogram, _ = np.histogram(read(*piece), bins=edges)
        counts.update({i: int(n) for i, n in enumerate(histogram)})
    return tuple(edges.tolist()), tuple(counts[i] for i in range(_BINS))
