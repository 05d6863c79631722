"""The plan of one checkpoint's conversion, as data: what happens to each weight, every output file,
the new config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.bnb_format import QuantState
from ..checkpoint.importance_file import ImportanceFile
from ..checkpoint.packed import PackedWeight
from ..checkpoint.types import Checkpoint, Region, View, Weight
from ..checkpoint.writer import ShardLayout
from ..format.config import QuantConfig
from ..format.dtypes import ITEMSIZE, TORCH_NAME
from .deltas import Delta
from .weights import ROUTER

if TYPE_CHECKING:
    from ..checkpoint.given_codes import CodeSource
    from ..engines.protocol import F32


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one weight, or to a stored tensor that becomes none.

    Attributes:
        weight: what it is and where it lies.
        action: "quantize", "decode", "cast", "copy", or "drop" for a tensor that nothing is
            written for.
        rule: the name of the selection rule that decided.
        reason: the same in words.
        view: the stored matrix whose transpose is written (Conv1D, fused experts), None for
            the tensor as it lies; of a packed weight, the matrix that its codes decode to.
        state: for "quantize": the quantization state; its nested_offset is not known yet.
        outputs: key -> (dtype, shape) of everything written for it, the weight itself first.
        file: index of the output shard it goes to.
        packed: for "decode": where the codes and their scales lie.
        packed_start: for "decode": the first of the packed elements that it is made of.
        region: the part of an output tensor that it is written to, where several weights become one
            tensor (an expert's matrix, decoded); None where it becomes a tensor of its own.
        deltas: what adapters do to it, in order; it is then float32 until it is written.
    """

    weight: Weight
    action: str
    rule: str
    reason: str
    view: View | None
    state: QuantState | None
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    file: int = 0
    packed: PackedWeight | None = None
    region: Region | None = None
    packed_start: int = 0
    deltas: tuple[Delta, ...] = ()

    @property
    def name(self) -> str:
        """Key of the weight in the output, unless `region` has another."""
        return self.weight.name

    @property
    def key(self) -> str:
        """Key of the output tensor that the weight, or its codes, is written to."""
        return self.region.key if self.region else self.name

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return prod(self.weight.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's elements that the weight is made of."""
        return self.numel * self.weight.bits // 8

    @property
    def nbytes_out(self) -> int:
        """Bytes of everything written for the weight."""
        return sum(ITEMSIZE[dtype] * prod(shape) for dtype, shape in self.outputs.values())


def _absmax_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of a weight's float32 absmax vector, 0 for a weight that has none."""
    return 4 * -(-tensor.numel // tensor.state.blocksize) if tensor.state else 0


def is_renamed(tensor: TensorPlan) -> bool:
    """Return whether a wrapper around the source's model has changed a tensor's name.

    An expert of a fused tensor has a name of its own too, but is only a part of it, and unsloth has
    a name of its own for a router.
    """
    stored = tensor.weight.stored
    is_router = tensor.name == stored.name.replace(*ROUTER)
    return tensor.name != stored.name and tensor.weight.shape == stored.shape and not is_router


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the conversion of one checkpoint will do.

    Attributes:
        checkpoint: the source.
        config: as asked, with every "auto" resolved.
        tensors: in the order they will be read.
        shards: output files.
        index: content of the index, None for a single output file.
        output_config: content of the new config.json, None where the source has none.
        notes: what the user should know, one sentence each.
        importance: of input columns, by which the loss is weighted; None for no data.
        codes: source of the codes that error feedback chose; None where all are the nearest.
    """

    checkpoint: Checkpoint
    config: QuantConfig
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardLayout, ...]
    index: dict[str, Any] | None
    output_config: dict[str, Any] | None
    notes: tuple[str, ...]
    importance: ImportanceFile | None = None
    codes: CodeSource | None = None

    def importance_of(self, name: str) -> F32 | None:
        """Return the importance of a weight's input columns, None where nothing is known of them.

        Args:
            name: of the weight, or of a part of one.

        Returns:
            float32 [columns].
        """
        columns = self.importance.columns.get(name) if self.importance else None
        return columns if columns is not None and columns.any() else None

    @property
    def source_bytes(self) -> int:
        """Bytes of all source shards."""
        return sum(shard.size for shard in self.checkpoint.shards)

    @property
    def work_bytes(self) -> int:
        """Bytes of the source that a run converts, and counts as progress."""
        return sum(t.source_bytes for t in self.tensors if t.outputs)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all output shards, exactly."""
        return sum(layout.size for layout in self.shards)

    @property
    def parameters(self) -> int:
        """Elements of all floating-point weights."""
        return sum(
            t.numel for t in self.tensors if t.weight.dtype in TORCH_NAME and t.action != "drop"
        )

    @property
    def written(self) -> int:
        """Weights of the output."""
        return sum(bool(t.outputs) for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Elements of the weights that become 4-bit."""
        return sum(t.numel for t in self.tensors if t.action == "quantize")

    @property
    def bits_per_weight(self) -> float:
        """Bits of all output tensors for each floating-point parameter."""
        return 8 * sum(t.nbytes_out for t in self.tensors) / max(1, self.parameters)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the largest temporary file: the float32 absmax of the largest weight."""
        return max(map(_absmax_bytes, self.tensors), default=0)

    @property
    def scattered_scratch_bytes(self) -> int:
        """Most bytes of the temporary files of weights with parts, which lie there from a weight's
        first part in the source to its last."""
        stacks = [t for t in self.tensors if len(t.weight.parts) > 1]
        order = {shard.path: i for i, shard in enumerate(self.checkpoint.shards)}
        changes = []
        for t in stacks:
            places = [(order[s.shard.path], s.stored.start) for s in t.weight.parts]
            changes += [(min(places), 0, _absmax_bytes(t)), (max(places), 1, -_absmax_bytes(t))]
        return max(accumulate(nbytes for *_, nbytes in sorted(changes)), default=0)

    def groups(self) -> list[tuple[str, str, int, int, int]]:
        """Return (action, reason, tensors, elements, output bytes) of each group of tensors.

        Quantized groups come first, then the others; each by output bytes, the largest first.
        """
        count: Counter[tuple[str, str]] = Counter()
        elements: Counter[tuple[str, str]] = Counter()
        nbytes: Counter[tuple[str, str]] = Counter()
        for t in self.tensors:
            key = (t.action, t.reason)
            count[key] += 1
            elements[key] += t.numel
            nbytes[key] += t.nbytes_out
        order = sorted(count, key=lambda key: (key[0] != "quantize", -nbytes[key], key))
        return [(*key, count[key], elements[key], nbytes[key]) for key in order]
