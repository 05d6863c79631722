"""Recognise float8 checkpoints, and find the scale of each float8 weight.

Two formats store e4m3 bytes beside float scales:

- "fp8" (DeepSeek-V3, Qwen3-FP8, Ministral): `X.weight` and `X.weight_scale_inv`, one factor
  for each block of `weight_block_size` (partial blocks at the edges), or one for the whole weight.
- "compressed-tensors" (llm-compressor): `X.weight` and `X.weight_scale`, one factor for
  each tensor, row (channel) or block, as `config_groups` says.

In both, weight = float32(e4m3) * float32(scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.bnb_format import find_quantized, quant_method, quantization_of
from ..checkpoint.types import Checkpoint, Scale, Shard, TensorInfo
from ..errors import InputError
from ..format.dtypes import FLOAT8
from .quantizers import is_leftover, quantizer_of

_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
_SCALE_SUFFIX = {"fp8": ("_scale_inv", "_scale"), "compressed-tensors": ("_scale",)}
_FOLDED = (
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
)
"""Suffixes of tensors that only float8 kernels read: scales of activations and of the key-value
cache."""

_NO_WEIGHTS, _NO_FORMAT = "no weights", "a fmt that is no string"
"""The problems of a config.json that is damaged, and therefore no leftover."""

WHERE_TO_GO = "start from the original full-precision checkpoint"


def is_float8(checkpoint: Checkpoint) -> bool:
    """Return whether a source is a float8 checkpoint of a kind that nf4 reads.

    The tensors decide: where none of them is quantized, a quantization_config is a leftover (of
    a QLoRA run whose adapter was merged, say), and it says nothing of them.

    Raises:
        InputError: it is quantized in another way, which the message names.
    """
    method, config = quant_method(checkpoint.config), quantization_of(checkpoint.config) or {}
    found = quantizer_of(checkpoint)
    if method == "fp8":
        problem = _fp8_problem(config)
    elif method == "compressed-tensors":
        problem = _compressed_problem(config)
    elif method is not None:
        problem = f"quant_method {method!r} in config.json's quantization_config"
    else:
        problem = None
    damaged = problem is not None and problem.endswith((_NO_WEIGHTS, _NO_FORMAT))
    if problem is not None and not damaged and is_leftover(checkpoint):
        return False
    stores = f"{found.tensor!r} is how {found.program} stores weights" if found else ""
    if found is not None and (problem is None or (found.methods and method not in found.methods)):
        says = "says nothing" if method is None else f"says quant_method {method!r}"
        problem = f"{stores}, though config.json {says}"
    elif found is not None:
        problem = f"{problem}; {stores}"
    if problem is None:
        return method is not None
    packed = bool(find_quantized(checkpoint))
    raise InputError(
        f"{checkpoint.root} is already quantized ({problem}): "
        f"{'undo it first: nf4 dequantize' if packed else WHERE_TO_GO}. The quantized sources that "
        "nf4 reads are float8 e4m3 of quant_method 'fp8' and 'compressed-tensors'"
    )


def _fp8_problem(config: Mapping[str, Any]) -> str | None:
    fmt = config.get("fmt", "e4m3")
    if not isinstance(fmt, str):
        return f"quant_method 'fp8' with {_NO_FORMAT}"
    if fmt not in ("e4m3", "float8_e4m3fn"):
        return f"quant_method 'fp8' with fmt {fmt!r}"
    return None


def _compressed_problem(config: Mapping[str, Any]) -> str | None:
    if config.get("transform_config"):
        return "quant_method 'compressed-tensors' with a transform_config"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "quant_method 'compressed-tensors' without config_groups"
    for name, group in groups.items():
        if problem := _group_problem(group):
            return f"quant_method 'compressed-tensors', {name}: {problem}"
    return None


def _group_problem(group: object) -> str | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        return _NO_WEIGHTS
    if weights.get("symmetric") is False:
        return "weights with zero points"
    kind, bits = weights.get("type"), weights.get("num_bits")
    if (kind, bits) != ("float", 8):
        return f"{bits}-bit {kind}"
    strategy = weights.get("strategy")
    return None if strategy in ("tensor", "channel", "block") else f"strategy {strategy!r}"


def find_scales(checkpoint: Checkpoint) -> tuple[dict[str, Scale], dict[str, str]]:
    """Return the scale of every float8 weight, and the tensors that belong to float8 only.

    Returns:
        (weight name -> its scale, name of a tensor that is no weight -> why it is left out).

    Raises:
        InputError: see `is_float8`; a float8 tensor has no scale, or one of the wrong shape or
            dtype; it is not e4m3, or no matrix; a scale has no weight.
    """
    scales: dict[str, Scale] = {}
    config = quantization_of(checkpoint.config) if is_float8(checkpoint) else None
    suffixes = () if config is None else _SCALE_SUFFIX[config["quant_method"]]
    blocks = _block_sizes(config or {})
    for name, (shard, tensor) in checkpoint.tensors.items():
        if tensor.dtype not in FLOAT8:
            continue
        where = f"{name} in {shard.path}"
        if not suffixes:
            raise InputError(
                f"{where} is {tensor.dtype}, but config.json has no quantization_config that says "
                f"how it is scaled: {WHERE_TO_GO}"
            )
        if tensor.dtype != "F8_E4M3":
            raise InputError(f"{where} is {tensor.dtype}; nf4 reads F8_E4M3: {WHERE_TO_GO}")
        place = next(filter(None, (checkpoint.tensors.get(name + s) for s in suffixes)), None)
        if place is None:
            raise InputError(
                f"{where} is F8_E4M3 but there is no {name + suffixes[0]}: it is incomplete. "
                "Download it again"
            )
        scales[name] = _scale(tensor, *place, blocks)
    scale_names = {scale.tensor.name for scale in scales.values()}
    unused = dict.fromkeys(scale_names, "the scales of a float8 weight, which are multiplied in")
    if suffixes:
        endings = tuple(f".weight{suffix}" for suffix in suffixes)
        for name in checkpoint.tensors:
            if name.endswith(endings) and name not in scale_names:
                raise InputError(
                    f"{name} in {checkpoint.root} has no float8 weight beside it: the checkpoint "
                    "is incomplete. Download it again"
                )
            if name.endswith(_FOLDED):
                unused[name] = "a scale that only float8 kernels read"
    return scales, unused


def _block_sizes(config: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Return every (rows, columns) of a block that a quantization_config names."""
    groups = config.get("config_groups")
    sizes = [config.get("weight_block_size")]
    if config.get("quant_method") == "compressed-tensors" and isinstance(groups, dict):
        sizes += [group["weights"].get("block_structure") for group in groups.values()]
    return {
        (block[0], block[1])
        for block in sizes
        if isinstance(block, list)
        and len(block) == 2
        and all(type(b) is int and b > 0 for b in block)
    }


def _scale(
    weight: TensorInfo, shard: Shard, scale: TensorInfo, blocks: set[tuple[int, int]]
) -> Scale:
    """Return the scale of a weight, with the block that its shape stands for.

    Args:
        shard: where the scale lies.
        blocks: the (rows, columns) that config.json names.

    Raises:
        InputError: the scale's dtype or shape is none of the possible ones.
    """
    if scale.dtype not in _SCALE_DTYPES:
        raise InputError(
            f"{scale.name} in {shard.path} is {scale.dtype}, expected one of "
            f"{', '.join(_SCALE_DTYPES)}: {WHERE_TO_GO}"
        )
    if len(weight.shape) != 2 or not weight.numel:
        raise InputError(
            f"{weight.name} is F8_E4M3 {list(weight.shape)}; nf4 reads float8 matrices: "
            f"{WHERE_TO_GO}"
        )
    rows, columns = weight.shape
    shapes: dict[tuple[int, ...], tuple[int, int]] = {
        (-(-rows // r), -(-columns // c)): (r, c) for r, c in blocks
    }
    shapes |= {(rows, 1): (1, columns), (rows,): (1, columns)}
    shapes |= dict.fromkeys([(), (1,), (1, 1)], (rows, columns))
    if scale.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes if shape)
        raise InputError(
            f"{scale.name} in {shard.path} has shape {list(scale.shape)}, which fits no way to "
            f"scale {weight.name} {list(weight.shape)}: expected {expected}. Download both again"
        )
    return Scale(shard, scale, shapes[scale.shape])
