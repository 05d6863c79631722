"""Compare two checkpoints, tensor by tensor: 4-bit or full, whoever wrote them.

Tensors are read a piece at a time, and packed weights are decoded as far as they differ.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..callbacks import Progress, no_progress
from ..checkpoint.discovery import open_checkpoint
from ..checkpoint.packed import PackedReader, PackedWeight, load_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint, Placed
from ..engines.protocol import Engine
from ..format.dtypes import FLOAT64, ITEMSIZE, TORCH_NAME
from ..threads import each

if TYPE_CHECKING:
    from ..engines.protocol import F32

_PIECE = 1 << 20  # elements decoded, or bytes read, at a time; a multiple of every blocksize
_FLOATS = (*TORCH_NAME, FLOAT64)


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A weight that two checkpoints do not have alike.

    Attributes:
        name: of the weight.
        kind: "only in A", "only in B", "shape", "values" (of the weight as it is decoded), or
            "storage" (the same values, stored in another way).
        a, b: how each stores it, in words; "" where it does not.
        shape_a, shape_b: of the weight in each, None where there is none.
        elements: of the weight, in A if it is there.
        changed: elements whose values differ, None where values were not compared.
        codes_changed: 4-bit codes that differ, None unless both are packed in the same type.
        rel_rmse: root of (sum of squared differences / sum of A's squares); None where it is not
            known or not finite.
        max_abs: the largest difference, None as before.
    """

    name: str
    kind: str
    a: str
    b: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    elements: int
    changed: int | None = None
    codes_changed: int | None = None
    rel_rmse: float | None = None
    max_abs: float | None = None


@dataclass(slots=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        bytes_a, bytes_b: of their weight files.
        same: number of weights that are alike, byte for byte or by their values and storage.
        tensors: the weights that are not, by name.
        config: key of config.json, with dots -> (value in A, value in B), None for none.
    """

    bytes_a: int
    bytes_b: int
    same: int = 0
    tensors: list[TensorDifference] = field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Return whether nothing differs."""
        return not self.tensors and not self.config

    @property
    def largest_first(self) -> list[TensorDifference]:
        """Return the weights that are not alike: those that cannot be compared, then the others by
        their difference."""
        return sorted(self.tensors, key=lambda t: (t.rel_rmse is not None, -(t.rel_rmse or 0)))


class _Side:
    """A checkpoint and its weights, packed or not.

    Args:
        checkpoint: the checkpoint.
        readers: read its files.
        engine: decodes.
    """

    def __init__(self, checkpoint: Checkpoint, readers: ShardReaders, engine: Engine) -> None:
        self._readers, self._engine = readers, engine
        self.packed: Mapping[str, PackedWeight] = {}
        if any(".quant_state." in name for name in checkpoint.tensors):
            self.packed = load_weights(checkpoint, readers)
        self.reader = PackedReader(readers, engine)
        parts = {part[1].name for weight in self.packed.values() for part in weight.parts()[1:]}
        self.stored = {k: p for k, p in checkpoint.tensors.items() if k not in parts}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        weight = self.packed.get(name)
        return tuple(weight.state.shape) if weight else self.stored[name][1].shape

    def words(self, name: str) -> str:
        """Return how a weight is stored, in words."""
        weight = self.packed.get(name)
        if weight is None:
            return self.stored[name][1].dtype
        return f"{weight.state.words}, {weight.state.dtype}"

    def pieces(self, placed: Placed) -> Iterator[bytes]:
        """Yield the bytes of a stored tensor."""
        shard, tensor = placed
        for start in range(0, tensor.nbytes, _PIECE):
            count = min(_PIECE, tensor.nbytes - start)
            yield self._readers[shard].read(tensor.start + start, count).tobytes()

    def parts(self, name: str) -> list[Placed]:
        """Return the stored tensors of a weight, the packed one first; no text of a state."""
        weight = self.packed.get(name)
        if weight is None:
            return [self.stored[name]]
        return [part for part in weight.parts() if part is not weight.state_blob]

    def values(self, name: str, start: int, count: int) -> F32:
        """Return elements [start, start + count) of a weight in float32."""
        weight = self.packed.get(name)
        if weight is not None:
            return self.reader.decode(weight, start, count, "F32").view(np.float32)
        shard, tensor = self.stored[name]
        size = ITEMSIZE[tensor.dtype]
        data = self._readers[shard].read(tensor.start + start * size, count * size)
        if tensor.dtype == FLOAT64:
            return data.view(np.float64).astype(np.float32)
        out = np.empty(count, np.float32)
        self._engine.cast(data, tensor.dtype, out.view(np.uint8), "F32")
        return out


def compare(
    a: Path, b: Path, engine: Engine, workers: int = 1, progress: Progress = no_progress
) -> Difference:
    """Compare two checkpoints.

    Args:
        a, b: their paths.
        engine: decodes.
        workers: threads; each holds some pieces of a few MB.
        progress: told the bytes of each weight of `a` and `b` that are done.

    Raises:
        InputError: one is no checkpoint, or a packed weight of it is incomplete.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    sizes = [sum(shard.size for shard in c.shards) for c in (first, second)]
    found = Difference(sizes[0], sizes[1])
    found.config = dict(_config_differences(first.config, second.config))
    with ShardReaders(first.shards) as of_a, ShardReaders(second.shards) as of_b:
        sides = _Side(first, of_a, engine), _Side(second, of_b, engine)
        lock = threading.Lock()

        def look(name: str, stop: threading.Event) -> None:
            difference = _of_weight(name, *sides)
            with lock:
                if difference is None:
                    found.same += 1
                else:
                    found.tensors.append(difference)
            progress(name, sum(_bytes_of(side, name) for side in sides))

        each(sorted(sides[0].stored.keys() | sides[1].stored.keys()), look, workers)
    found.tensors.sort(key=lambda difference: difference.name)
    return found


def _bytes_of(side: _Side, name: str) -> int:
    if name in side.packed:
        return side.packed[name].nbytes
    return side.stored[name][1].nbytes if name in side.stored else 0


def _config_differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield (key, (value in a, value in b)) of what differs in two JSON objects."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            inner = f"{key}.{name}" if key else str(name)
            yield from _config_differences(a.get(name), b.get(name), inner)
    elif a != b:
        yield key, (a, b)


def _of_weight(name: str, a: _Side, b: _Side) -> TensorDifference | None:
    """Return how a weight differs, None where it does not."""
    for mine, other, which in ((a, b, "only in A"), (b, a, "only in B")):
        if name not in other.stored:
            words, shape = mine.words(name), mine.shape(name)
            size = math.prod(shape)
            if mine is a:
                return TensorDifference(name, which, words, "", shape, None, size)
            return TensorDifference(name, which, "", words, None, shape, size)
    shapes = a.shape(name), b.shape(name)
    described = partial(
        TensorDifference, name, a=a.words(name), b=b.words(name), shape_a=shapes[0],
        shape_b=shapes[1], elements=math.prod(shapes[0]),
    )  # fmt: skip
    if shapes[0] != shapes[1]:
        return described(kind="shape")
    if _is_stored_alike(name, a, b):
        return None
    codes = _codes_changed(name, a, b)
    if not all(name in side.packed or side.stored[name][1].dtype in _FLOATS for side in (a, b)):
        return described(kind="values", changed=_bytes_changed(name, a, b))
    changed, rel_rmse, max_abs = _distance(name, a, b)
    kind = "values" if changed else "storage"
    return described(
        kind=kind, changed=changed, codes_changed=codes, rel_rmse=rel_rmse, max_abs=max_abs
    )


def _is_stored_alike(name: str, a: _Side, b: _Side) -> bool:
    """Return whether a weight has the same bytes, dtypes and quantization state."""
    weights = a.packed.get(name), b.packed.get(name)
    if (weights[0] and weights[0].state) != (weights[1] and weights[1].state):
        return False
    parts = a.parts(name), b.parts(name)
    if [p[1].dtype for p in parts[0]] != [p[1].dtype for p in parts[1]]:
        return False
    return all(
        mine == other
        for x, y in zip(*parts, strict=True)
        for mine, other in zip(a.pieces(x), b.pieces(y), strict=True)
    )


def _codes_changed(name: str, a: _Side, b: _Side) -> int | None:
    """Return how many 4-bit codes differ, None unless both have codes of the same table."""
    x, y = a.packed.get(name), b.packed.get(name)
    if x is None or y is None or x.state.quant_type != y.state.quant_type:
        return None
    changed = 0
    for mine, other in zip(a.pieces(x.packed), b.pieces(y.packed), strict=True):
        differ = np.frombuffer(mine, np.uint8) ^ np.frombuffer(other, np.uint8)
        changed += int(np.count_nonzero(differ & 15) + np.count_nonzero(differ >> 4))
    return changed


def _bytes_changed(name: str, a: _Side, b: _Side) -> int | None:
    """Return how many elements of another dtype than floats differ, None of two dtypes."""
    x, y = a.stored[name], b.stored[name]
    if x[1].dtype != y[1].dtype or not x[1].numel:
        return None
    size, changed = x[1].nbytes // x[1].numel, 0
    for mine, other in zip(a.pieces(x), b.pieces(y), strict=True):
        differ = np.frombuffer(mine, np.uint8) != np.frombuffer(other, np.uint8)
        changed += int(differ.reshape(-1, size).any(axis=1).sum())
    return changed


def _distance(name: str, a: _Side, b: _Side) -> tuple[int, float | None, float | None]:
    """Return (elements that differ, relative RMSE, largest difference), see `TensorDifference`."""
    total = math.prod(a.shape(name))
    changed, errors, squares, largest = 0, 0.0, 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, total, _PIECE):
            count = min(_PIECE, total - start)
            mine, other = (side.values(name, start, count) for side in (a, b))
            differ = (mine != other) & ~(np.isnan(mine) & np.isnan(other))
            changed += int(np.count_nonzero(differ))
            gap = np.where(differ, mine.astype(np.float64) - other, 0.0)
            errors += float(gap @ gap)
            squares += float(np.square(mine, dtype=np.float64).sum())
            largest = max(largest, float(np.abs(gap).max()))
            if math.isnan(errors):
                largest = math.nan
    if not changed:
        return 0, 0.0, 0.0
    relative = math.sqrt(errors / squares) if squares and math.isfinite(errors) else math.nan
    known = [value if math.isfinite(value) else None for value in (relative, largest)]
    return changed, known[0], known[1]
