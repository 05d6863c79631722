"""Read the integer and 4-bit float formats of compressed-tensors (llm-compressor).

- "pack-quantized": `X.weight_packed`, int32 that each hold 8 integers of 4 bits or 4 of 8 bits,
  with an offset; `X.weight_scale` for each tensor, row or group; `X.weight_zero_point` where the
  scheme is not symmetric; `X.weight_shape`.
- "int-quantized": `X.weight`, int8, and the same scales.
- "nvfp4-pack-quantized": `X.weight_packed`, two 4-bit floats in a byte; `X.weight_scale` (float8
  e4m3) for each group of 16, which is divided by `X.weight_global_scale`.
- "mxfp4-pack-quantized": the same with exponents for each group of 32.

A checkpoint may hold several of them, and float8 (float8.py).  Each weight's own tensors show which
config group it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.encoded import refuse_shape
from ..checkpoint.reader import ByteReader
from ..checkpoint.types import Checkpoint, Encoding, Placed, TensorInfo
from ..errors import InputError
from .encoded_weight import (
    WHERE_TO_GO,
    EncodedWeight,
    Found,
    companion,
    refuse_orphans,
    require_shape,
)
from .modelopt import GROUP

PACKED = ".weight_packed"
NO_WEIGHTS = "no weights"
"""The problem of a config.json that is damaged, and therefore no leftover."""
_FLOATS = ("F32", "F16", "BF16")
_STRATEGIES = {
    ("float", 8): ("tensor", "channel", "block"),
    ("int", 8): ("tensor", "channel", "group"),
    ("int", 4): ("tensor", "channel", "group"),
    ("float", 4): ("tensor_group", "group"),
}
"""(type, bits) of a scheme -> the strategies that nf4 reads."""
_MX_GROUP = 32


@dataclass(frozen=True, slots=True)
class _Scheme:
    """What a config group says of its weights.

    Attributes:
        kind: (type, bits).
        group: columns that share a factor; 0 for a whole row, None for the whole tensor.
        symmetric: whether there are no zero points.
    """

    kind: tuple[str, int]
    group: int | None
    symmetric: bool


def problem(config: Mapping[str, Any]) -> str | None:
    """Return what nf4 does not read of a quantization_config, in words; None for nothing."""
    says = "quant_method 'compressed-tensors'"
    if config.get("transform_config"):
        return f"{says} with a transform_config"
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return f"{says} with sparse weights ({sparsity.get('format')!r})"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return f"{says} without config_groups"
    for name, group in groups.items():
        if found := _group_problem(group):
            return f"{says}, {name}: {found}"
    return None


def _group_problem(group: object) -> str | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        return NO_WEIGHTS
    kind, bits = weights.get("type"), weights.get("num_bits")
    if not isinstance(kind, str) or type(bits) is not int or (kind, bits) not in _STRATEGIES:
        return f"{bits}-bit {kind}"
    if weights.get("symmetric") is False and kind != "int":
        return "floats with zero points"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy not in _STRATEGIES[kind, bits]:
        return f"{bits}-bit {kind} with strategy {strategy!r}"
    if "group" in str(strategy) and (type(size) is not int or size < 1 or size % 2):
        return f"groups of {size!r}"
    return None


def _schemes(config: Mapping[str, Any]) -> list[_Scheme]:
    """Return what each config group says, of a config without a problem."""
    found = []
    for group in config["config_groups"].values():
        weights = group["weights"]
        strategy = weights["strategy"]
        size = {"tensor": None, "channel": 0}.get(strategy, weights.get("group_size"))
        kind = weights["type"], weights["num_bits"]
        found.append(_Scheme(kind, size, weights.get("symmetric") is not False))
    return list(dict.fromkeys(found))


def find(checkpoint: Checkpoint, config: Mapping[str, Any], found: Found) -> None:
    """Add every weight of a source that is stored as integers or 4-bit floats.

    Raises:
        InputError: a tensor of a weight is missing or of another dtype or shape, or contradicts
            weight_shape; or it fits no config group, or several.
    """
    schemes = _schemes(config)
    for name, (shard, tensor) in checkpoint.tensors.items():
        if name.endswith("_g_idx"):
            raise InputError(
                f"{name} in {shard.path} puts the columns of groups in another order, which nf4 "
                f"does not read of compressed-tensors: {WHERE_TO_GO}"
            )
        packed = name.endswith(PACKED)
        if not packed and not (tensor.dtype == "I8" and name.endswith(".weight")):
            continue
        if len(tensor.shape) not in (2, 3) or not tensor.numel:
            raise InputError(
                f"{name} in {shard.path} is {tensor.dtype} {list(tensor.shape)}, expected a matrix "
                f"or a stack of matrices: {WHERE_TO_GO}"
            )
        if packed and tensor.dtype == "U8":
            encoding = _float4(checkpoint, tensor, schemes)
        elif not packed or tensor.dtype == "I32":
            encoding = _integers(checkpoint, tensor, schemes)
        else:
            raise InputError(
                f"{name} in {shard.path} is {tensor.dtype}, expected I32 or U8: {WHERE_TO_GO}"
            )
        shape = (*tensor.shape[:-1], encoding.columns)
        suffix, ending = (PACKED, ".weight") if packed else ("", "")
        found.add(EncodedWeight(name, suffix, ending, shape, encoding))
    words = "packed weight"
    refuse_orphans(
        checkpoint, found, dict.fromkeys((".weight_shape", ".weight_global_scale"), words)
    )


def _base(name: str) -> str:
    return name.removesuffix("_packed")


def _float4(checkpoint: Checkpoint, tensor: TensorInfo, schemes: list[_Scheme]) -> Encoding:
    """Return how a weight of 4-bit floats decodes."""
    *stack, rows, half = tensor.shape
    columns, name, owner = 2 * half, tensor.name, f"{tensor.name} {list(tensor.shape)}"
    if not any(scheme.kind == ("float", 4) for scheme in schemes):
        raise InputError(_fits_none(checkpoint, tensor))
    scale = companion(checkpoint, name, _base(name) + "_scale", ("F8_E4M3", "U8", "F8_E8M0"))
    matrices = stack[0] if stack else 1
    size = GROUP if scale[1].dtype == "F8_E4M3" else _MX_GROUP
    require_shape(scale, owner, [(*stack, rows, -(-columns // size))])
    if size == _MX_GROUP:
        return Encoding(
            "MXFP4", "e2m1", matrices, rows, columns, (1, size), scale, exponents=True,
            through="BF16",
        )  # fmt: skip
    unit = companion(checkpoint, name, _base(name) + "_global_scale", ("F32",))
    require_shape(unit, owner, [(1,)])
    return Encoding(
        "NVFP4", "e2m1", matrices, rows, columns, (1, size), scale, unit=unit, divides=True,
        through="BF16",
    )  # fmt: skip


def _integers(checkpoint: Checkpoint, tensor: TensorInfo, schemes: list[_Scheme]) -> Encoding:
    """Return how a weight of integers decodes, by the one config group that fits it.

    Raises:
        InputError: none fits, or several that decode it differently.
    """
    name = tensor.name
    scale = companion(checkpoint, name, _base(name) + "_scale", _FLOATS)
    fitting = list(_candidates(checkpoint, tensor, scale, schemes))
    if not fitting:
        raise InputError(_fits_none(checkpoint, tensor, scale))
    if len(fitting) > 1 and fitting[0].says_shape is not None and checkpoint.origin is None:
        said = _stated_shape(fitting[0].says_shape)
        fitting = [e for e in fitting if said[-1:] == [e.columns]] or fitting[:1]
    if len(fitting) > 1:
        raise InputError(
            f"{name} in {checkpoint.tensors[name][0].path} fits several config_groups of "
            "config.json, which decode it differently: its headers do not say which. Download "
            "the checkpoint and give its directory"
        )
    (encoding,) = fitting
    if encoding.says_shape is not None and checkpoint.origin is None:
        said = _stated_shape(encoding.says_shape)
        refuse_shape(encoding.says_shape[1].name, said, encoding)
    return encoding


def _candidates(
    checkpoint: Checkpoint, tensor: TensorInfo, scale: Placed, schemes: list[_Scheme]
) -> Iterator[Encoding]:
    """Yield how a weight of integers decodes by each config group that its tensors fit."""
    *stack, rows, width = tensor.shape
    name, packed = tensor.name, tensor.dtype == "I32"
    zero = checkpoint.tensors.get(_base(name) + "_zero_point")
    for scheme in schemes:
        kind, bits = scheme.kind
        if kind != "int" or (bits != 8 and not packed):
            continue
        columns = width * 32 // bits if packed else width
        across = 1 if not scheme.group else -(-columns // scheme.group)
        if scheme.group and columns % scheme.group:
            continue
        shapes = [(*stack, rows, across)]
        if scheme.group == 0:
            shapes.append((*stack, rows))
        if scheme.group is None:
            shapes = [(), (1,), (1, 1)]
        if scale[1].shape not in shapes:
            continue
        zeros = None if scheme.symmetric else zero
        if not scheme.symmetric and not _zero_fits(zero, scale[1], bits):
            continue
        block = (rows, columns) if scheme.group is None else (1, scheme.group or columns)
        matrices = stack[0] if stack else 1
        if scheme.group is None:
            matrices, rows = 1, matrices * rows
            block = (rows, columns)
        shape = None
        if packed:
            shape = companion(checkpoint, name, _base(name) + "_shape", ("I64", "I32"))
            require_shape(shape, f"{name} {list(tensor.shape)}", [(len(tensor.shape),)])
        yield Encoding(
            f"INT{bits}", f"offset{bits}" if packed else "int8", matrices, rows, columns, block,
            scale, zero=zeros, says_shape=shape, through=scale[1].dtype,
        )  # fmt: skip


def _zero_fits(zero: Placed | None, scale: TensorInfo, bits: int) -> bool:
    """Return whether zero points have the shape that goes with the scales."""
    if zero is None:
        return False
    tensor = zero[1]
    if tensor.dtype == "I8":
        return tensor.shape == scale.shape
    if tensor.dtype != "I32" or len(scale.shape) != 2 or len(tensor.shape) != 2:
        return False
    rows, across = scale.shape
    return tensor.shape == (-(-rows * bits // 32), across)


def _fits_none(checkpoint: Checkpoint, tensor: TensorInfo, scale: Placed | None = None) -> str:
    shard, _ = checkpoint.tensors[tensor.name]
    zero = checkpoint.tensors.get(_base(tensor.name) + "_zero_point")
    beside = [f"{t.name} {t.dtype} {list(t.shape)}" for _, t in filter(None, (scale, zero))]
    return (
        f"{tensor.name} in {shard.path} is {tensor.dtype} {list(tensor.shape)}"
        f"{', with ' if beside else ''}{' and '.join(beside)}, which fits none of the "
        "config_groups of config.json: one of them is damaged or incomplete. Download all again"
    )


def _stated_shape(placed: Placed) -> list[int]:
    """Return the shape of a weight that its weight_shape states."""
    shard, tensor = placed
    with ByteReader(shard.path, shard.size) as reader:
        raw = reader.read(tensor.start, tensor.nbytes)
    found: list[int] = raw.view({"I64": np.int64, "I32": np.int32}[tensor.dtype]).tolist()
    return found
