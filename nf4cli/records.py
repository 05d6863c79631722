"""The frozen records that travel through the house, and the dtypes they speak of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .fileio import Identity

ITEMSIZE: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes an element of each safetensors dtype that we copy."""

TORCH_NAME: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes the engines encode from and decode to, by safetensors name, as torch spells them."""

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""The float8 dtypes that weights are stored in, by safetensors name."""

SAFETENSORS_NAME: Mapping[str, str] = {torch: st for st, torch in TORCH_NAME.items()}

STORAGE_NAME: Mapping[str, str] = {"uint8": "U8", **SAFETENSORS_NAME}
"""quant_storage as torch spells it -> the safetensors dtype of the packed tensor."""


QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

MODEL_STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"

SCALES = ("absmax", "search")
METHODS = ("rtn", "gptq")
ON_NONFINITE = ("error", "keep")
TARGETS = ("transformers", "vllm", "unsloth")
"""Who shall load the output: transformers 4 and 5 as they are, or a loader that takes every expert
of a mixture as a 4-bit matrix of its own, which transformers 5 does not."""


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
class Answer:
    """What transformers itself says of a checkpoint (exact.py).

    Attributes:
        version: of transformers.
        quantized: tensors whose modules it holds in 4 bit, and that arrive there as they are.
        rearranged: tensors that it splits, merges or permutes while loading, which a packed
            weight cannot go through.
        modules: path in the checkpoint -> paths in the model, where they differ: several for a
            weight that is split.
    """

    version: str
    quantized: frozenset[str]
    rearranged: frozenset[str]
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """Everything about the output that a user may choose and that changes its bytes.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: elements that share one absmax.
        double_quant: quantize the absmax vector to 8 bits as well.
        quant_storage: dtype that the packed bytes are stored as ("uint8").
        compute_dtype: bnb_4bit_compute_dtype, or "auto" for the model's dtype.
        dtype: dtype of the kept floating tensors, or "auto" for the model's.
        keep: patterns of modules to leave in full precision.
        target: the loader it is for, one of TARGETS.
        on_nonfinite: what to do with a weight that holds a NaN or an infinity: "error", or "keep"
            it in full precision.
        asked: who was asked which modules are held in 4 bit ("transformers 5.23.0"), "" where
            the rules alone decided.
        max_shard_size: bytes of tensors an output shard may hold; a larger single tensor gets
            a shard of its own.
        scale: "absmax", or "search" for the scale of least loss, of either sign.
        method: how a code is chosen: "rtn", the nearest, or "gptq", with error feedback.
        importance: BLAKE3 of the importance file that the loss is weighted by, "" for none.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    quant_storage: str = "uint8"
    compute_dtype: str = "auto"
    dtype: str = "auto"
    keep: tuple[str, ...] = field(default=())
    target: str = "transformers"
    on_nonfinite: str = "error"
    asked: str = ""
    max_shard_size: int = 5_000_000_000
    scale: str = "absmax"
    method: str = "rtn"
    importance: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As it is recorded: patterns in order, since theirs has no meaning; how scales and codes
        were chosen only where it is not bitsandbytes' way, as before there was a choice."""
        fields = {**asdict(self), "keep": sorted(self.keep)}
        for name in ("scale", "method", "importance"):
            if fields[name] == getattr(type(self)(), name):
                del fields[name]
        return fields


@dataclass(frozen=True, slots=True)
class TensorError:
    """What rounding to 4 bits cost, under each block's own float32 absmax.

    Double quantization moves the decoded scales by another few thousandths of themselves; that
    is not in these figures.

    Attributes:
        rel_rmse: root of (sum of squared error / sum of squared value).
        max_abs: largest error of one element.
        blocks: how many share an absmax each; None where a manifest does not say.
        outlier_blocks: those whose absmax is above 10 times the root mean square of their other
            elements, which then have few codes left.
        worst_block: of codes that are not the nearest, the largest root mean square error of a
            block, in units of its scale; None for the nearest.
    """

    rel_rmse: float
    max_abs: float
    blocks: int | None = None
    outlier_blocks: int | None = None
    worst_block: float | None = None

    @property
    def outlier_share(self) -> float:
        """Outlier blocks among all, 0 where they are not known."""
        return (self.outlier_blocks or 0) / max(1, self.blocks or 0)

    def as_dict(self) -> dict[str, float | int]:
        """What is known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Result:
    """What is known of a weight of the output when all of its bytes are written.

    Attributes:
        nested_offset: of its quantization state, None where there is no nested state.
        error: of a quantized weight.
        sources: XXH3-128 of the stored tensors that it was made from, by name; without those
            that no digest is known of yet.
    """

    nested_offset: float | None
    error: TensorError | None
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FileDigests:
    """Attributes:
    digest: of the whole file, in the run's algorithm.
    tensors: XXH3-128 of each tensor in it, by name.
    """

    digest: str
    tensors: Mapping[str, str]
