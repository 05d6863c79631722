"""The dataclasses that describe a checkpoint: tensors, shards, weights, their origin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..format.dtypes import ITEMSIZE
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


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of a float8 weight, which its stored values are multiplied by.

    Attributes:
        shard, tensor: where the scales lie.
        block: (rows, columns) of the weight's elements that share one scale.
    """

    shard: Shard
    tensor: TensorInfo
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor as the model holds it, and the stored bytes that it is made from.

    Attributes:
        name: the key that a loader looks for.
        dtype: safetensors dtype of its values: the stored one, or what float8 decodes to.
        shape: its shape in the model, which without `view` is also the stored shape.
        shard, stored: the stored tensor and its file; several weights may share them.
        view: the part of `stored` that is transposed to give this weight; None if the weight is the
            whole stored tensor as it lies.
        scale: the scales of a float8 weight, else None.
        parts: the weights that it is made of, one behind the other (the experts of a layer); () for
            a weight of one stored tensor.  `shard` and `stored` are then those of the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    stored: TensorInfo
    view: View | None = None
    scale: Scale | None = None
    parts: tuple[Weight, ...] = ()

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
