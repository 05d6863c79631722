"""The parts of a checkpoint: tensors, shards, weights, where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..format.dtypes import ITEMSIZE
from .file_io import Identity

MODEL_STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file, from its header.

    Attributes:
        name: the key in the file.
        dtype: safetensors name ("BF16").
        shape: elements a dimension.
        start: offset of its first byte from the start of the FILE.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def stop(self) -> int:
        """Offset in the file of the byte behind its last."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class View:
    """A matrix inside a stored tensor, in elements.

    Attributes:
        start: the first element, counted from the stored tensor's first.
        rows, columns: as they lie in the file.
        stride: from one row to the next.
    """

    start: int
    rows: int
    columns: int
    stride: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: where it lies.
        size: bytes in the file.
        data_start: offset of the first tensor byte (8 + header length).
        tensors: in offset order, no holes between them.
        identity: which file it was, in which state, when its header was read.
    """

    path: Path
    size: int
    data_start: int
    tensors: tuple[TensorInfo, ...]
    identity: Identity = (0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Scale:
    """The factors of a float8 weight.

    Attributes:
        shard, tensor: where they lie.
        block: (rows, columns) of the weight that share one factor.
    """

    shard: Shard
    tensor: TensorInfo
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor as the model holds it, and the stored bytes that it is made from.

    Attributes:
        name: the key a loader looks for.
        dtype: of its values: the stored dtype, or the one that float8 decodes to.
        shape: as the model holds it, or as it is stored where `view` is None.
        shard, stored: the tensor in the file; several weights may share one.
        view: the part of `stored` that it is, transposed; None for all of it, as it lies.
        scale: of a float8 weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    stored: TensorInfo
    view: View | None = None
    scale: Scale | None = None


def is_diffusers_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a diffusers component."""
    return "_class_name" in config and "model_type" not in config


@dataclass(frozen=True, slots=True)
class Origin:
    """The commit of a model on a Hub, whose bytes never change.

    Attributes:
        repo: `org/name`.
        commit: 40 hexadecimal digits.
        sha256: of the weight files by name, as the Hub states it; without those that lie in git.
    """

    repo: str
    commit: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory (or one file) of safetensors shards with what lies beside them.

    Attributes:
        root: the directory (the file's directory for a single file).
        name: what the user would call it: the directory's or the file's stem.
        shards: in the order of their names.
        tensors: every tensor by name, with its shard.
        config: config.json, {} where there is none.
        is_file: the user named one file, whose directory may hold anything.
        extra_files: other files worth copying, relative to root, sorted.
        left_files: files that are NOT copied (other weight formats), relative, sorted.
        origin: of a model that comes from a Hub; its shards then need not be on the disk, nor
            stay there.
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
        """Whether it is a component of a diffusers pipeline: other names, another loader."""
        if self.config:
            return is_diffusers_config(self.config)
        return self.shards[0].path.name.startswith(DIFFUSERS_STEM)

    @property
    def stem(self) -> str:
        """What the names of its weight files begin with, as its loader expects them."""
        return DIFFUSERS_STEM if self.is_diffusers else MODEL_STEM


@dataclass(frozen=True, slots=True)
class FileDigests:
    """Attributes:
    digest: of the whole file, in the run's algorithm.
    tensors: XXH3-128 of each tensor in it, by name.
    """

    digest: str
    tensors: Mapping[str, str]
