"""Read GPTQ and AWQ of 4 bits, for --requantize.

Both hold `X.qweight`, `X.qzeros` and `X.scales` [groups, out] of a weight [out, in]: its codes lie
transposed, 8 in an int32, along the inputs (GPTQ) or along the outputs (AWQ).  `X.g_idx` of GPTQ
says which group each input belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.encoded import PER_WORD
from ..checkpoint.types import Checkpoint, Encoding, TensorInfo
from ..errors import InputError
from .encoded_weight import (
    WHERE_TO_GO,
    EncodedWeight,
    Found,
    companion,
    refuse_orphans,
    require_shape,
)

METHODS = ("gptq", "awq")
CODES = ".qweight"
_FLOATS = ("F16", "BF16", "F32")


def problem(config: Mapping[str, Any]) -> str | None:
    """Return what nf4 does not read of a quantization_config, in words; None for nothing."""
    method = config.get("quant_method")
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        return f"quant_method {method!r} with {bits!r} bits"
    if method == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
        return f"quant_method 'awq' of version {config['version']!r}"
    form = config.get("checkpoint_format", "gptq")
    if method == "gptq" and form not in ("gptq", "gptq_v2"):
        return f"quant_method 'gptq' with checkpoint_format {form!r}"
    return None


def find(checkpoint: Checkpoint, config: Mapping[str, Any], found: Found) -> None:
    """Add every GPTQ or AWQ weight of a source.

    Raises:
        InputError: a tensor of a weight is missing, or of another dtype or shape.
    """
    layout = "awq" if config["quant_method"] == "awq" else config.get("checkpoint_format", "gptq")
    for name, (shard, tensor) in checkpoint.tensors.items():
        if not name.endswith(CODES):
            continue
        if tensor.dtype != "I32" or len(tensor.shape) != 2 or not tensor.numel:
            raise InputError(
                f"{name} in {shard.path} is {tensor.dtype} {list(tensor.shape)}, expected a matrix "
                f"of I32: {WHERE_TO_GO}"
            )
        encoding = _encoding(checkpoint, tensor, layout)
        shape = (encoding.rows, encoding.columns)
        found.add(EncodedWeight(name, CODES, ".weight", shape, encoding))
    words = "qweight"
    refuse_orphans(checkpoint, found, dict.fromkeys((".qzeros", ".scales", ".g_idx"), words))


def _encoding(checkpoint: Checkpoint, tensor: TensorInfo, layout: str) -> Encoding:
    """Return how a weight decodes."""
    name, owner = tensor.name, f"{tensor.name} {list(tensor.shape)}"
    base = name.removesuffix(CODES)
    high, wide = tensor.shape
    columns, rows = (high, wide * PER_WORD) if layout == "awq" else (high * PER_WORD, wide)
    scale = companion(checkpoint, name, f"{base}.scales", _FLOATS)
    groups = scale[1].shape[0] if len(scale[1].shape) == 2 else 1
    require_shape(scale, owner, [(max(1, groups), rows)])
    zero = companion(checkpoint, name, f"{base}.qzeros", ("I32",))
    require_shape(zero, owner, [(groups, -(-rows // PER_WORD))])
    size = -(-columns // groups)
    order = checkpoint.tensors.get(f"{base}.g_idx") if layout != "awq" else None
    if order is not None:
        companion(checkpoint, name, order[1].name, ("I32",))
        require_shape(order, owner, [(columns,)])
    if -(-columns // size) != groups:
        raise InputError(
            f"{scale[1].name} in {scale[0].path} has {groups:,} groups, which do not divide the "
            f"{columns:,} inputs of {owner}: it is damaged. Download both again"
        )
    return Encoding(
        "AWQ" if layout == "awq" else "GPTQ", "uint8", 1, rows, columns, (1, size), scale,
        zero=zero, order=order, through=scale[1].dtype, layout=layout,
    )  # fmt: skip
