"""The packed weights of a finished checkpoint, ours or anybody's: found, checked, decoded.

What `dequantize`, `inspect` and `verify` have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..engines.protocol import NestedAbsmax
from ..errors import InputError
from ..format.codebook import codebook, nested_map
from ..format.dtypes import ITEMSIZE
from . import bnb_format
from .bnb_format import QuantState
from .reader import ShardReaders
from .types import Checkpoint, Shard, TensorInfo

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8, Engine

Placed = tuple[Shard, TensorInfo]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One packed weight with its companions, complete and of consistent sizes.

    Attributes:
        name: key of the packed tensor.
        state: its parsed state.
        packed, absmax: where they lie.
        nested_absmax, nested_quant_map: None unless state.nested.
        quant_map: the stored table.
    """

    name: str
    state: QuantState
    packed: Placed
    absmax: Placed
    quant_map: Placed
    state_blob: Placed
    nested_absmax: Placed | None
    nested_quant_map: Placed | None

    @property
    def numel(self) -> int:
        """Weights."""
        return prod(self.state.shape)

    @property
    def blocks(self) -> int:
        """Entries of the absmax vector."""
        return -(-self.numel // self.state.blocksize)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(placed[1].nbytes for placed in self.parts())

    def parts(self) -> tuple[Placed, ...]:
        """Every tensor that belongs to it, the packed one first."""
        optional = (self.nested_absmax, self.nested_quant_map)
        return (
            self.packed, self.absmax, self.quant_map, self.state_blob,
            *(placed for placed in optional if placed is not None),
        )  # fmt: skip


def find_weights(
    checkpoint: Checkpoint, readers: ShardReaders
) -> tuple[dict[str, PackedWeight], list[tuple[str, str]]]:
    """Every complete packed weight by name, and (name, what is wrong) of the others."""
    weights: dict[str, PackedWeight] = {}
    problems: list[tuple[str, str]] = []
    quantized = bnb_format.find_quantized(checkpoint)
    for name, states in quantized.items():
        if len(states) > 1:
            keys = " and ".join(state.state_key for state in states)
            problems.append((name, f"{name} has more than one quant_state: {keys}"))
            continue
        try:
            weights[name] = _weight(checkpoint, readers, states[0])
        except InputError as error:
            problems.append((name, str(error)))
    for key in checkpoint.tensors:
        owner = bnb_format.companion_owner(key)
        if owner is not None and owner not in quantized:
            problems.append((owner, f"{key} belongs to {owner}, which has no quant_state"))
    return weights, problems


def load_weights(checkpoint: Checkpoint, readers: ShardReaders) -> dict[str, PackedWeight]:
    """Every packed weight by name.

    Raises:
        InputError: one is incomplete or inconsistent, or there is none.
    """
    weights, problems = find_weights(checkpoint, readers)
    if problems:
        more = (
            f" (and {len(problems) - 1} more problems: nf4 verify shows all)"
            if problems[1:]
            else ""
        )
        raise InputError(f"{checkpoint.root}: {problems[0][1]}{more}")
    if not weights:
        raise InputError(
            f"{checkpoint.root} holds no bitsandbytes 4-bit weight: no key has a quant_state"
        )
    return weights


def _weight(
    checkpoint: Checkpoint, readers: ShardReaders, found: bnb_format.QuantizedWeight
) -> PackedWeight:
    blob = checkpoint.tensors[found.state_key]
    state = bnb_format.decode_state(read_state(readers, blob), found.state_key)
    if state.quant_type != found.quant_type:
        raise InputError(
            f"{found.state_key} says quant_type {state.quant_type!r}: expected {found.quant_type!r}"
        )
    if found.name not in checkpoint.tensors:
        raise InputError(f"{found.name} is missing, though {found.state_key} is there")
    storage = bnb_format.storage_of(checkpoint.tensors[found.name][1])
    if storage is None:
        raise InputError(
            f"{found.name} is stored as {checkpoint.tensors[found.name][1].dtype}: expected U8, or "
            "a float dtype chosen as quant_storage"
        )
    expected = bnb_format.expected_tensors(found.name, state, storage)

    packed = checkpoint.tensors[found.name][1]
    if packed.nbytes != (prod(state.shape) + 1) // 2:
        raise InputError(
            f"{found.name} has {packed.nbytes:,} bytes: expected {(prod(state.shape) + 1) // 2:,} "
            f"for a weight of shape {list(state.shape)}"
        )

    def part(suffix: str) -> Placed:
        key = found.name + suffix
        if key not in checkpoint.tensors:
            raise InputError(f"{key} is missing: the state of {found.name} is incomplete")
        tensor = checkpoint.tensors[key][1]
        dtype, shape = expected[key]
        if tensor.dtype != dtype or tensor.numel != prod(shape):
            raise InputError(
                f"{key} is {tensor.dtype} {list(tensor.shape)}: expected {dtype} {list(shape)} for "
                f"a weight of shape {list(state.shape)} at blocksize {state.blocksize}"
            )
        return checkpoint.tensors[key]

    return PackedWeight(
        name=found.name,
        state=state,
        packed=part(""),
        absmax=part(bnb_format.ABSMAX),
        quant_map=part(bnb_format.QUANT_MAP),
        state_blob=blob,
        nested_absmax=part(bnb_format.NESTED_ABSMAX) if state.nested else None,
        nested_quant_map=part(bnb_format.NESTED_QUANT_MAP) if state.nested else None,
    )


def read_state(readers: ShardReaders, placed: Placed) -> bytes:
    """The bytes of a quant_state blob.

    Raises:
        InputError: it is larger than any can be.
    """
    shard, tensor = placed
    if tensor.nbytes > bnb_format.MAX_STATE:
        raise InputError(
            f"{tensor.name} has {tensor.nbytes:,} bytes, expected a quantization state of at most "
            f"{bnb_format.MAX_STATE:,}"
        )
    return readers[shard].read(tensor.start, tensor.nbytes).tobytes()


def has_chosen_scales(weight: PackedWeight) -> bool:
    """Whether its scales are no largest magnitudes: with double quantization their mean, which is
    positive, would be taken from them first."""
    return weight.state.nested and weight.state.nested_offset == 0.0


class PackedReader:
    """Reads parts of packed weights; every method is thread-safe."""

    def __init__(self, readers: ShardReaders, engine: Engine) -> None:
        self._readers = readers
        self._engine = engine

    def read(self, placed: Placed, start: int, count: int) -> U8:
        """`count` bytes from byte `start` of a tensor."""
        shard, tensor = placed
        return self._readers[shard].read(tensor.start + start, count)

    def read_into(self, placed: Placed, start: int, data: U8) -> None:
        """Fill `data` with bytes from byte `start` of a tensor."""
        shard, tensor = placed
        self._readers[shard].read_into(data, tensor.start + start)

    def floats(self, placed: Placed) -> F32:
        """A whole (small) float32 tensor."""
        return self.read(placed, 0, placed[1].nbytes).view(np.float32)

    def absmax(self, weight: PackedWeight, first: int, count: int) -> F32:
        """Decoded absmax of blocks [first, first + count)."""
        stored = self._stored_absmax(weight, first, count)
        if isinstance(stored, NestedAbsmax):
            return self._engine.nested_dequantize(stored)
        return stored

    def _stored_absmax(self, weight: PackedWeight, first: int, count: int) -> F32 | NestedAbsmax:
        """The same as it is stored."""
        if weight.nested_absmax is None or weight.nested_quant_map is None:
            return self.read(weight.absmax, 4 * first, 4 * count).view(np.float32)
        run = weight.state.nested_blocksize
        aligned = first // run * run
        codes = self.read(weight.absmax, aligned, first + count - aligned)
        runs = -(-codes.size // run)
        return NestedAbsmax(
            codes,
            first - aligned,
            run,
            self.floats(weight.nested_quant_map),
            self.read(weight.nested_absmax, 4 * (aligned // run), 4 * runs).view(np.float32),
            weight.state.nested_offset,
        )

    def packed(self, weight: PackedWeight, start: int, count: int) -> U8:
        """The bytes of elements [start, start + count); start is even."""
        return self.read(weight.packed, start // 2, (count + 1) // 2)

    def require_standard_table(self, weight: PackedWeight) -> None:
        """Raises InputError when the stored quant_map is not the one the codes decode with."""
        table = codebook(weight.state.quant_type).decode
        if not np.array_equal(self.floats(weight.quant_map), table):
            raise InputError(
                f"{weight.name}: its quant_map is not the {weight.state.quant_type} table; "
                "nf4 decodes NF4 and FP4 only"
            )

    def decode(
        self, weight: PackedWeight, start: int, count: int, dtype: str,
        packed: U8 | None = None, out: U8 | None = None,
    ) -> U8:  # fmt: skip
        """Elements [start, start + count) as raw bytes of `dtype`; start is a block's first.

        Args:
            packed, out: buffers for the packed and the decoded bytes, at least as large, to be
                used again (`Engine.buffer`); None for new ones.

        Raises:
            InputError: a scale is too large for `dtype`.
        """
        blocksize = weight.state.blocksize
        blocks, nbytes = -(-count // blocksize), count * ITEMSIZE[dtype]
        absmax = self._stored_absmax(weight, start // blocksize, blocks)
        if dtype == "F16" and self._overflows(absmax):
            raise InputError(
                f"{weight.name} has values too large for float16: choose another --dtype"
            )
        if packed is None:
            packed = self.packed(weight, start, count)
        else:
            packed = packed[: (count + 1) // 2]
            self.read_into(weight.packed, start // 2, packed)
        out = np.empty(nbytes, np.uint8) if out is None else out[:nbytes]
        self._engine.dequantize(
            packed, count, blocksize, weight.state.quant_type, absmax, dtype, out
        )
        return out

    def _overflows(self, absmax: F32 | NestedAbsmax) -> bool:
        """Whether a scale is too large for float16."""
        largest = float(np.finfo(np.float16).max)
        if isinstance(absmax, NestedAbsmax):
            bound = np.abs(absmax.map).max() * np.abs(absmax.absmax).max() + abs(absmax.offset)
            if bound < largest:
                return False
            absmax = self._engine.nested_dequantize(absmax)
        return bool((np.abs(absmax) > largest).any())


def standard_nested_map(values: F32) -> bool:
    """Whether a stored nested_quant_map is bitsandbytes' own."""
    return bool(np.array_equal(values, nested_map()))


def by_shard(weights: Mapping[str, PackedWeight]) -> list[PackedWeight]:
    """In the order of their packed bytes on the disk."""
    return sorted(weights.values(), key=lambda w: (w.packed[0].path.name, w.packed[1].start))
