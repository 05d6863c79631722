"""Tell from the tensors which program has quantized a source, whatever config.json says.

config.json may be of another state of the model: the merged result of a QLoRA run keeps the
quantization_config of its 4-bit base, and an MLX or quanto model names no method that loaders know.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.bnb_format import find_quantized, quant_method, quantization_of
from ..checkpoint.types import Checkpoint, TensorInfo
from ..format.dtypes import FLOAT8

_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
"""Dtypes of packed weights.  Index tables of ordinary models are I64."""
_WHILE_RUNNING = ("bitnet",)
"""Methods that keep 16-bit weights and quantize them whenever the model runs."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What has quantized a source.

    Attributes:
        program: its name in words.
        methods: what config.json calls it.
        tensor: name of a tensor that shows it.
    """

    program: str
    methods: tuple[str, ...]
    tensor: str


_BY_SUFFIX: dict[str, tuple[str, tuple[str, ...]]] = {
    ".qweight": ("GPTQ or AWQ", ("gptq", "awq", "intel/auto-round", "auto-round")),
    ".weight_packed": ("compressed-tensors", ("compressed-tensors",)),
    ".bitmask": ("compressed-tensors", ("compressed-tensors",)),
    "_proj_blocks": ("MXFP4", ("mxfp4",)),
    ".SCB": ("bitsandbytes 8-bit", ("bitsandbytes",)),
    "._data": ("quanto", ("quanto",)),
    ".W_q": ("HQQ", ("hqq",)),
    ".Qidxs": ("QuIP#", ("quip",)),
    ".q_weight": ("ExLlamaV2", ("exl2",)),
    ".trellis": ("ExLlamaV3", ("exl3",)),
    ".codebooks": ("AQLM", ("aqlm",)),
    "_weight_qdata": ("torchao", ("torchao",)),
    ".weight_scale_2": ("NVFP4", ("modelopt",)),
}
"""Suffix of a tensor's name -> (program, what config.json calls it)."""


def quantizer_of(checkpoint: Checkpoint) -> Quantizer | None:
    """Return which quantization the tensors show, None for none and for float8.

    bitsandbytes 4-bit is found by `bnb_format.find_quantized`, and said by who asks.
    """
    packed = find_quantized(checkpoint)
    if packed and quant_method(checkpoint.config) is not None:
        return Quantizer("bitsandbytes 4-bit", ("bitsandbytes",), next(iter(packed)))
    if packed:
        return None
    integers = None
    for name, (_, tensor) in checkpoint.tensors.items():
        for suffix, (program, methods) in _BY_SUFFIX.items():
            if name.endswith(suffix) and _is_companion(checkpoint, name, suffix):
                return Quantizer(program, methods, name)
        base = name.removesuffix(".weight")
        if base == name or len(tensor.shape) < 2 or tensor.dtype not in _INTEGERS:
            continue
        if tensor.dtype == "U32" and f"{base}.scales" in checkpoint.tensors:
            return Quantizer("MLX", ("mlx",), name)
        if f"{base}.SCB" not in checkpoint.tensors and integers is None:
            integers = Quantizer(f"a program that packs them into {tensor.dtype}", (), name)
    return integers


def _is_companion(checkpoint: Checkpoint, name: str, suffix: str) -> bool:
    """Return whether a name that has a program's suffix also has that program's other tensors.

    Of the suffixes that other models use as well.
    """
    base = name.removesuffix(suffix)
    if suffix == "._data":
        return f"{base}._scale" in checkpoint.tensors
    if suffix == ".codebooks":
        return f"{base}.codes" in checkpoint.tensors
    return True


def is_leftover(checkpoint: Checkpoint) -> bool:
    """Return whether config.json says that the model is quantized, and no tensor is."""
    if quantization_of(checkpoint.config) is None or quantizer_of(checkpoint) is not None:
        return False
    if quant_method(checkpoint.config) in _WHILE_RUNNING:
        return False
    return not any(_may_be_packed(name, t) for name, (_, t) in checkpoint.tensors.items())


def _may_be_packed(name: str, tensor: TensorInfo) -> bool:
    """Return whether a tensor is of a kind that only quantized models have: float8, scales of
    weights, or a matrix of integers (GPT-2's mask is called `bias`)."""
    if tensor.dtype in FLOAT8 or name.endswith((".weight_scale", ".weight_scale_inv")):
        return True
    return tensor.dtype in _INTEGERS and len(tensor.shape) > 1 and not name.endswith("bias")


def leftover_note(checkpoint: Checkpoint) -> list[str]:
    """Return a note about a quantization_config that the tensors contradict, in a list; [] for
    none."""
    if not is_leftover(checkpoint):
        return []
    return [
        f"config.json says that the model is quantized (quant_method "
        f"{quant_method(checkpoint.config)!r}), but no tensor is: it is a leftover, and the "
        "weights are converted as they are stored. The output's quantization_config is nf4's own"
    ]
