"""Read float8 checkpoints: bytes of float8 beside float scales.

weight = float32(byte) * float32(scale), in these spellings:

- "fp8" (DeepSeek-V3, Qwen3-FP8, Ministral): `X.weight` and `X.weight_scale_inv`, one factor
  for each block of `weight_block_size` (partial blocks at the edges), or one for the whole weight.
- "compressed-tensors" (llm-compressor), "modelopt" and "fbgemm_fp8": `X.weight` and
  `X.weight_scale`, one factor for each tensor, row (channel), block or group.
- Stacks of matrices (experts) have a scale for each matrix, each of its rows, columns or blocks.
- Diffusion models in a single file: `X.weight` and `X.scale_weight`, or no scales at all.
- Mistral's own files (consolidated.safetensors): `X.weight` and `X.qscale_weight`, one factor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from ..checkpoint.types import Checkpoint, Encoding, Placed, TensorInfo
from ..errors import InputError
from ..format.dtypes import FLOAT8 as DTYPES
from .encoded_weight import FLOAT8, WHERE_TO_GO, EncodedWeight, Found

_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
_SUFFIXES = ("_scale_inv", "_scale")
"""What the name of a weight's scale ends in, behind the weight's own."""
_DIFFUSION_SCALE, _DIFFUSION_MARK = ".scale_weight", "scaled_fp8"
"""ComfyUI's spelling of a scale, and the tensor that says that there are such."""
_MISTRAL_SCALE = ".qscale_weight"
"""Mistral's, which vLLM renames to `weight_scale` (vllm/model_executor/models/mistral.py)."""
_OTHER_SCALES = (_DIFFUSION_SCALE, _MISTRAL_SCALE)
_FOLDED = (
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".input_scale_ub",
    ".scale_input",
    ".qscale_act",
    ".input_global_scale",
    ".comfy_quant",
)
"""Suffixes of tensors that only kernels of quantized models read: scales of activations and of the
key-value cache, and what they are told of a layer."""


def find(checkpoint: Checkpoint, config: Mapping[str, Any] | None, found: Found) -> None:
    """Add every float8 weight of a source, and leave out what belongs to float8 only.

    Args:
        config: the quantization_config; None where there is none.
        found: has the weights in other formats already, whose scales may be float8.

    Raises:
        InputError: a float8 tensor has no scale, or one of the wrong shape or dtype; a scale has no
            weight.
    """
    if any(tensor.dtype in DTYPES for _, tensor in checkpoint.tensors.values()):
        _add_float8(checkpoint, config, found)
    if found.weights:
        _leave_folded(checkpoint, found)


def _add_float8(checkpoint: Checkpoint, config: Mapping[str, Any] | None, found: Found) -> None:
    """Add every float8 weight of a source that has some; arguments and errors as for `find`."""
    blocks = _block_sizes(config or {})
    scaled = config is not None or _has_scales(checkpoint)
    known = config is not None or not checkpoint.config or checkpoint.is_diffusers
    unknown = _unknown_scales(checkpoint)
    for name, (shard, tensor) in checkpoint.tensors.items():
        if tensor.dtype not in DTYPES or found.knows(name):
            continue
        if _is_mark(name):
            found.left[name] = "says that the file is float8 with scales"
            continue
        place = _scale_of(checkpoint, name)
        if place is None and (scaled or not known):
            suffix = _SUFFIXES[config is None or config.get("quant_method") != "fp8"]
            raise InputError(_no_scale(f"{name} in {shard.path}", tensor, name + suffix, known))
        if place is None and (other := unknown.get(name.removesuffix(".weight"))):
            raise InputError(
                f"{name} in {shard.path} is {tensor.dtype} and {other} lies beside it, which looks "
                f"like a scale, of a form that nf4 does not know: {WHERE_TO_GO}"
            )
        encoding = _unscaled(tensor) if place is None else _encoding(tensor, place, blocks, known)
        found.add(EncodedWeight(name, "", "", tensor.shape, encoding))


def _is_mark(name: str) -> bool:
    return name.rpartition(".")[2] == _DIFFUSION_MARK


def _has_scales(checkpoint: Checkpoint) -> bool:
    """Return whether any tensor is a scale, so that float8 bytes are not values as they are."""
    suffixes = (*_SUFFIXES, *_OTHER_SCALES)
    return any(n.endswith(suffixes) or _is_mark(n) for n in checkpoint.tensors)


def _no_scale(where: str, tensor: TensorInfo, scale: str, known: bool) -> str:
    """Return the message about a float8 tensor that nothing says the scale of.

    Args:
        scale: name that it should have.
        known: whether the source is one of scaled float8.
    """
    if not known:
        return (
            f"{where} is {tensor.dtype}, but config.json has no quantization_config that says "
            f"how it is scaled: {WHERE_TO_GO}"
        )
    return f"{where} is {tensor.dtype} but there is no {scale}: it is incomplete. Download it again"


def _scale_of(checkpoint: Checkpoint, name: str) -> Placed | None:
    """Return the scale of a float8 tensor, None where there is none."""
    names = [name + suffix for suffix in _SUFFIXES]
    names += [name.removesuffix(".weight") + scale for scale in _OTHER_SCALES]
    return next(filter(None, map(checkpoint.tensors.get, names)), None)


def _unknown_scales(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what looks like the scale of a module's weight, by the module."""
    return {
        module.removesuffix(".weight"): name
        for name in checkpoint.tensors
        for module, _, leaf in [name.rpartition(".")]
        if "scale" in leaf and not name.endswith(_FOLDED)
    }


def _leave_folded(checkpoint: Checkpoint, found: Found) -> None:
    """Leave out the scales that only kernels read; raise InputError for one of a missing weight."""
    endings = tuple(f".weight{suffix}" for suffix in _SUFFIXES)
    for name in checkpoint.tensors:
        if found.knows(name):
            continue
        if name.endswith(endings):
            raise InputError(
                f"{name} in {checkpoint.root} has no float8 weight beside it: the checkpoint "
                "is incomplete. Download it again"
            )
        if name.endswith(_FOLDED):
            found.left[name] = "a scale that only float8 kernels read"


def _block_sizes(config: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Return every (rows, columns) of a block that a quantization_config names."""
    groups = config.get("config_groups")
    sizes = [config.get("weight_block_size")]
    if config.get("quant_method") == "compressed-tensors" and isinstance(groups, dict):
        for group in groups.values():
            size = group["weights"].get("group_size")
            sizes += [group["weights"].get("block_structure"), [1, size]]
    return {
        (block[0], block[1])
        for block in sizes
        if isinstance(block, list)
        and len(block) == 2
        and all(type(b) is int and b > 0 for b in block)
    }


def _kind(tensor: TensorInfo) -> str:
    return "e4m3" if tensor.dtype == "F8_E4M3" else "e5m2"


def _unscaled(tensor: TensorInfo) -> Encoding:
    """Return how bytes without scales decode, of a tensor of any shape."""
    size = tensor.numel
    return Encoding(FLOAT8, _kind(tensor), 1, 1, size, (1, max(1, size)), None)


def _encoding(
    weight: TensorInfo, place: Placed, blocks: Collection[tuple[int, int]], known: bool
) -> Encoding:
    """Return how a float8 weight decodes, with the block that the shape of its scale stands for.

    Args:
        place: of the scale.
        blocks: the (rows, columns) that config.json names.
        known: whether the source says that it is one of scaled float8.

    Raises:
        InputError: the scale's dtype or shape is none of the possible ones.
    """
    shard, scale = place
    if scale.dtype not in _SCALE_DTYPES:
        raise InputError(
            f"{scale.name} in {shard.path} is {scale.dtype}, expected one of "
            f"{', '.join(_SCALE_DTYPES)}: {WHERE_TO_GO}"
        )
    if scale.numel == 1 and weight.numel:
        *stack, columns = weight.shape or (1,)
        rows = prod(stack)
        return Encoding(FLOAT8, _kind(weight), 1, rows, columns, (rows, columns), place)
    if len(weight.shape) not in (2, 3) or not weight.numel:
        raise InputError(
            f"{weight.name} is {weight.dtype} {list(weight.shape)}; nf4 reads float8 matrices and "
            f"stacks of them, and one scale for a tensor of any shape: {WHERE_TO_GO}"
        )
    *stack, rows, columns = weight.shape
    shapes = scale_shapes(tuple(stack), rows, columns, blocks)
    if scale.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes if shape)
        raise InputError(
            f"{scale.name} in {shard.path} has shape {list(scale.shape)}, which fits no way to "
            f"scale {weight.name} {weight.dtype} {list(weight.shape)}: expected {expected}. "
            + (
                "Download both again"
                if known
                else "config.json has no quantization_config, which would name the size of blocks"
            )
        )
    matrices = stack[0] if stack else 1
    return Encoding(FLOAT8, _kind(weight), matrices, rows, columns, shapes[scale.shape], place)


def scale_shapes(
    stack: tuple[int, ...], rows: int, columns: int, blocks: Collection[tuple[int, int]]
) -> dict[tuple[int, ...], tuple[int, int]]:
    """Return the shapes that the scales of matrices may have -> (rows, columns) of a block.

    Args:
        stack: (number of matrices,) of a 3-D tensor, () of a matrix.
        blocks: those that config.json names.
    """
    shapes: dict[tuple[int, ...], tuple[int, int]] = {
        (*stack, -(-rows // r), -(-columns // c)): (r, c) for r, c in blocks
    }
    shapes |= {(*stack, rows, 1): (1, columns), (*stack, rows): (1, columns)}
    if stack:  # Llama 4's experts are stored [in, out], and scaled by their outputs
        shapes |= {(*stack, columns, 1): (rows, 1), (*stack, 1, columns): (rows, 1)}
        shapes |= {(*stack, rows, 1): (1, columns)}
        shapes |= dict.fromkeys([stack, (*stack, 1), (*stack, 1, 1)], (rows, columns))
    else:
        shapes |= dict.fromkeys([(), (1,), (1, 1)], (rows, columns))
    return shapes
