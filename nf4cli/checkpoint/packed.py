"""Find, check and decode the packed weights of a 4-bit checkpoint, whichever program wrote it.

`dequantize`, `inspect` and `verify` all read checkpoints through this module.
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
from .types import Checkpoint, Placed

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8, Engine


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight with all the tensors of its quantization state, of consistent sizes.

    Attributes:
        name: key of the packed tensor.
        state: its quantization state.
        packed: the 4-bit codes, two in a byte.
        absmax: the scales of the blocks: float32, or uint8 codes if `state.nested`.
        quant_map: the 4-bit table, float32 [16].
        state_blob: the JSON that `state` was parsed from.
        nested_absmax: the scales of the absmax codes, float32; None unless `state.nested`.
        nested_quant_map: the 8-bit map of the absmax codes, float32 [256]; None unless
            `state.nested`.
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
        """Number of elements."""
        return prod(self.state.shape)

    @property
    def blocks(self) -> int:
        """Number of blocks, which is the length of the absmax vector."""
        return -(-self.numel // self.state.blocksize)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all its tensors."""
        return sum(placed[1].nbytes for placed in self.parts())

    def parts(self) -> tuple[Placed, ...]:
        """Return all its tensors, the packed one first."""
        optional = (self.nested_absmax, self.nested_quant_map)
        return (
            self.packed, self.absmax, self.quant_map, self.state_blob,
            *(placed for placed in optional if placed is not None),
        )  # fmt: skip


def find_weights(
    checkpoint: Checkpoint, readers: ShardReaders
) -> tuple[dict[str, PackedWeight], list[tuple[str, str]]]:
    """Find the packed weights of a checkpoint and check that they are complete.

    Returns:
        (name -> weight, of the complete ones; (name, what is wrong) of each of the others).
    """
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
    """Return name -> packed weight of a checkpoint.

    Raises:
        InputError: a weight is incomplete or inconsistent, or there is no packed weight.
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
    checkpoint: Checkpoint, readers: ShardReaders, keys: bnb_format.QuantizedWeight
) -> PackedWeight:
    """Return the packed weight with these keys.

    Raises:
        InputError: it is incomplete or inconsistent.
    """
    name = keys.name
    blob = checkpoint.tensors[keys.state_key]
    state = bnb_format.decode_state(read_state(readers, blob), keys.state_key)
    if state.quant_type != keys.quant_type:
        raise InputError(
            f"{keys.state_key} says quant_type {state.quant_type!r}: expected {keys.quant_type!r}"
        )
    if name not in checkpoint.tensors:
        raise InputError(f"{name} is missing, though {keys.state_key} is there")
    packed = checkpoint.tensors[name][1]
    storage = bnb_format.storage_of(packed)
    if storage is None:
        raise InputError(
            f"{name} is stored as {packed.dtype}: expected U8, or a float dtype chosen as "
            "quant_storage"
        )
    expected = bnb_format.expected_tensors(name, state, storage)
    nbytes = (prod(state.shape) + 1) // 2
    if packed.nbytes != nbytes:
        raise InputError(
            f"{name} has {packed.nbytes:,} bytes: expected {nbytes:,} for a weight of shape "
            f"{list(state.shape)}"
        )

    def part(suffix: str) -> Placed:
        key = name + suffix
        if key not in checkpoint.tensors:
            raise InputError(f"{key} is missing: the state of {name} is incomplete")
        tensor = checkpoint.tensors[key][1]
        dtype, shape = expected[key]
        if tensor.dtype != dtype or tensor.numel != prod(shape):
            raise InputError(
                f"{key} is {tensor.dtype} {list(tensor.shape)}: expected {dtype} {list(shape)} for "
                f"a weight of shape {list(state.shape)} at blocksize {state.blocksize}"
            )
        return checkpoint.tensors[key]

    return PackedWeight(
        name=name,
        state=state,
        packed=part(""),
        absmax=part(bnb_format.ABSMAX),
        quant_map=part(bnb_format.QUANT_MAP),
        state_blob=blob,
        nested_absmax=part(bnb_format.NESTED_ABSMAX) if state.nested else None,
        nested_quant_map=part(bnb_format.NESTED_QUANT_MAP) if state.nested else None,
    )


def read_state(readers: ShardReaders, placed: Placed) -> bytes:
    """Read the bytes of a quant_state.

    Raises:
        InputError: it is larger than any quant_state, or its file ends too early.
    """
    shard, tensor = placed
    if tensor.nbytes > bnb_format.MAX_STATE:
        raise InputError(
            f"{tensor.name} has {tensor.nbytes:,} bytes, expected a quantization state of at most "
            f"{bnb_format.MAX_STATE:,}"
        )
    return readers[shard].read(tensor.start, tensor.nbytes).tobytes()


def has_chosen_scales(weight: PackedWeight) -> bool:
    """Return whether a search chose the scales, judged by an offset of 0 in double quantization.

    Scales that are largest magnitudes have a positive mean, which becomes the offset.  Without
    double quantization the scales do not show how they were chosen: the result is False.
    """
    return weight.state.nested and weight.state.nested_offset == 0.0


class PackedReader:
    """Reads and decodes parts of packed weights; every method is thread-safe.

    All methods raise InputError if a file ends too early.

    Args:
        readers: the open files of the checkpoint.
        engine: decodes the weights.
    """

    def __init__(self, readers: ShardReaders, engine: Engine) -> None:
        self._readers = readers
        self._engine = engine

    def read(self, placed: Placed, start: int, count: int) -> U8:
        """Return `count` bytes from byte `start` of a tensor, uint8 [count]."""
        shard, tensor = placed
        return self._readers[shard].read(tensor.start + start, count)

    def read_into(self, placed: Placed, start: int, data: U8) -> None:
        """Fill `data` with bytes from byte `start` of a tensor."""
        shard, tensor = placed
        self._readers[shard].read_into(data, tensor.start + start)

    def floats(self, placed: Placed) -> F32:
        """Return a whole float32 tensor, which should be small, flattened."""
        return self.read(placed, 0, placed[1].nbytes).view(np.float32)

    def absmax(self, weight: PackedWeight, first: int, count: int) -> F32:
        """Return the decoded absmax of blocks [first, first + count), float32 [count]."""
        stored = self._stored_absmax(weight, first, count)
        if isinstance(stored, NestedAbsmax):
            return self._engine.nested_dequantize(stored)
        return stored

    def _stored_absmax(self, weight: PackedWeight, first: int, count: int) -> F32 | NestedAbsmax:
        """Return the absmax of blocks [first, first + count) as it is stored."""
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
        """Return the packed bytes of elements [start, start + count); start must be even."""
        return self.read(weight.packed, start // 2, (count + 1) // 2)

    def require_standard_table(self, weight: PackedWeight) -> None:
        """Raise InputError if the stored quant_map is not the table of the weight's quant_type."""
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
        """Decode elements [start, start + count), where `start` is the first one of a block.

        Args:
            dtype: of the result, a safetensors name.
            packed, out: buffers for the packed and the decoded bytes, at least that large, which
                may be used again (see `Engine.buffer`); None for new ones.

        Returns:
            Raw bytes of `dtype`, uint8; a part of `out` if that was given.

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
        """Return whether a scale is too large for float16."""
        largest = float(np.finfo(np.float16).max)
        if isinstance(absmax, NestedAbsmax):
            bound = np.abs(absmax.map).max() * np.abs(absmax.absmax).max() + abs(absmax.offset)
            if bound < largest:
                return False
            absmax = self._engine.nested_dequantize(absmax)
        return bool((np.abs(absmax) > largest).any())


def standard_nested_map(values: F32) -> bool:
    """Return whether a stored nested_quant_map is the map that bitsandbytes writes."""
    return bool(np.array_equal(values, nested_map()))


def by_shard(weights: Mapping[str, PackedWeight]) -> list[PackedWeight]:
    """Return the weights in the order of their packed bytes: by file name, then by offset."""
    return sorted(weights.values(), key=lambda w: (w.packed[0].path.name, w.packed[1].start))
