"""The dataclasses that describe a checkpoint: tensors, shards, weights, their origin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..format.dtypes import CODE_BITS, ITEMSIZE
from .file_io import Identity

MODEL_STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"
"""What the names of weight files begin with: for transformers, and for diffusers."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file, as the header describes it.

    Attributes:
        name: its key in the file.
        dtype: safetensors name ("BF16").
        shape: elements in each dimension.
        start: offset in bytes of its first byte from the start of the FILE, not of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def __reduce__(self) -> tuple[type[TensorInfo], tuple[object, ...]]:
        """Return what makes it anew, which is pickled in a third of the time of a dataclass."""
        return TensorInfo, (self.name, self.dtype, self.shape, self.start)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def stop(self) -> int:
        """Offset in the file of the byte behind its last one."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class View:
    """A matrix inside a stored tensor; all numbers are elements.

    Attributes:
        start: index of its first element in the flattened stored tensor.
        rows, columns: its size as it lies in the file.
        stride: elements from the start of one row to the start of the next.
    """

    start: int
    rows: int
    columns: int
    stride: int


@dataclass(frozen=True, slots=True)
class Region:
    """A matrix inside an output tensor that several weights are written into.

    Attributes:
        key: of the output tensor.
        shape: of the output tensor.
        start: index of the matrix's first element in the flattened output tensor.
        stride: elements from the start of one row to the start of the next.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    stride: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: where it lies.
        size: bytes of the file.
        data_start: offset of the first tensor byte (8 + length of the header).
        tensors: its tensors in offset order, without holes between them.
        identity: which file it was, and in which state, when its header was read.
    """

    path: Path
    size: int
    data_start: int
    tensors: tuple[TensorInfo, ...]
    identity: Identity = (0, 0, 0, 0, 0)


Placed = tuple[Shard, TensorInfo]
"""A tensor and the file that it lies in."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a weight is stored as codes: an element is (value of its code - zero point) * factor.

    The codes are one or several matrices, row-major and one behind the other.  Each block of a
    matrix has a factor, and may have a zero point.

    Attributes:
        format: its name, for users ("MXFP4").
        kind: of the codes, see `codebook.code_values`.
        matrices, rows, columns: how many matrices of codes there are, and the size of each.
        block: (rows, columns) of the elements that share a factor.
        scale: the factors, one for each block of each matrix; None where all are 1.
        exponents: whether `scale` holds bytes that are powers of two: 2 ** (byte - 127).
        unit: a single number that every factor is multiplied by, or divided by where `divides`.
        zero: the zero points.
        order: for each column the block that it belongs to (GPTQ's g_idx).
        says_shape: where the source states the shape of the weight (weight_shape).
        through: dtype that values are rounded to before the model's, as the format's own library
            does; None for none.
        transposed: whether the weight holds each matrix transposed.
        layout: how codes and zero points lie, see encoded.py.
        skip: how many matrices of other weights lie before these in the stored tensor, and have
            their factors before theirs; only in the layout "rows".
    """

    format: str
    kind: str
    matrices: int
    rows: int
    columns: int
    block: tuple[int, int]
    scale: Placed | None
    exponents: bool = False
    unit: Placed | None = None
    divides: bool = False
    zero: Placed | None = None
    order: Placed | None = None
    says_shape: Placed | None = None
    through: str | None = None
    transposed: bool = False
    layout: str = "rows"
    skip: int = 0

    @property
    def skipped_bytes(self) -> int:
        """Bytes of the stored tensor before the weight's own."""
        return self.skip * self.rows * self.columns * self.bits // 8

    @property
    def companions(self) -> tuple[Placed, ...]:
        """The tensors that the weight is made of, beside its codes."""
        every = (self.scale, self.unit, self.zero, self.order, self.says_shape)
        return tuple(placed for placed in every if placed is not None)

    @property
    def bits(self) -> int:
        """Bits of a code, 8 or 4."""
        return CODE_BITS[self.kind] if self.layout == "rows" else 4


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor as the model holds it, and the stored bytes that it is made from.

    Attributes:
        name: the key that a loader looks for.
        dtype: safetensors dtype of its values: the stored one, or what its codes decode to.
        shape: its shape in the model, which without `view` and `encoding` is also the stored shape.
        shard, stored: the stored tensor and its file; several weights may share them.
        view: the part of `stored` that is transposed to give this weight; None if the weight is the
            whole stored tensor as it lies.
        encoding: how `stored` decodes, where it holds codes; None where it holds the values.
        parts: the weights that it is made of, one behind the other (the experts of a layer); () for
            a weight of one stored tensor.  `shard` and `stored` are then those of the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    stored: TensorInfo
    view: View | None = None
    encoding: Encoding | None = None
    parts: tuple[Weight, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of the stored tensor for each element."""
        return self.encoding.bits if self.encoding else 8 * ITEMSIZE[self.stored.dtype]

    @property
    def placed(self) -> tuple[Placed, ...]:
        """The stored tensor, and those that its codes decode with; of a weight without parts."""
        return (self.shard, self.stored), *(self.encoding.companions if self.encoding else ())

    @property
    def sources(self) -> tuple[Weight, ...]:
        """The weights of one stored tensor each that it is made of: itself, or its parts."""
        return self.parts or (self,)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def is_diffusers_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json belongs to a component of a diffusers pipeline."""
    return "_class_name" in config and "model_type" not in config


@dataclass(frozen=True, slots=True)
class Origin:
    """The commit on a Hub that a model comes from; the bytes of a commit never change.

    Attributes:
        repo: name of the repository, `org/name`.
        commit: 40 hexadecimal digits.
        sha256: name of a weight file -> SHA-256, as the Hub states it.  Small files that the
            repository holds in git itself are missing, since the Hub states none for them.
    """

    repo: str
    commit: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's directory of safetensors files, or a single such file, and the files beside it.

    Attributes:
        root: the directory; for a single file, the directory that it lies in.
        name: name of the directory, or of the file without its suffix.
        shards: the safetensors files, in the order of their names.
        tensors: name -> (its shard, the tensor), of all shards.
        config: config.json, {} if there is none.
        is_file: whether the user named a single file, whose directory may hold anything else.
        extra_files: other files that an output copies, relative to root, sorted.
        left_files: files that an output does not copy (such as other weight formats), relative to
            root, sorted.
        origin: where a model of a Hub comes from, else None.  The shards of such a model need not
            be on the disk yet, or any more.
        params: params.json, the configuration in Mistral's and Meta's own layout, {} if there is
            none or a config.json.
    """

    root: Path
    name: str
    shards: tuple[Shard, ...]
    tensors: Mapping[str, tuple[Shard, TensorInfo]]
    config: Mapping[str, Any]
    is_file: bool
    extra_files: tuple[str, ...]
    left_files: tuple[str, ...]
    origin: Origin | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    index_errors: tuple[str, ...] = ()

    @property
    def is_diffusers(self) -> bool:
        """Return whether it is a component of a diffusers pipeline, with names of its own."""
        if self.config:
            return is_diffusers_config(self.config)
        return self.shards[0].path.name.startswith(DIFFUSERS_STEM)

    def with_extra(self, names: Collection[str]) -> Checkpoint:
        """Return the checkpoint with more files that an output copies, relative to root."""
        return replace(
            self,
            extra_files=tuple(sorted({*self.extra_files, *names})),
            left_files=tuple(name for name in self.left_files if name not in names),
        )

    @property
    def stem(self) -> str:
        """Return what the names of its weight files begin with, as its loader expects."""
        return DIFFUSERS_STEM if self.is_diffusers else MODEL_STEM


@dataclass(frozen=True, slots=True)
class FileDigests:
    """The digests of a safetensors file.

    Attributes:
        digest: digest of the whole file, in the algorithm of the run.
        tensors: name -> XXH3-128 of each tensor in the file.
    """

    digest: str
    tensors: Mapping[str, str]
