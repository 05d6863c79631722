"""Find the weights that a source stores as codes, in every format that nf4 reads.

The tensors decide what a source is.  Its quantization_config has to agree: it names the method, and
says what the tensors do not show (groups, zero points).  What nf4 does not read is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.bnb_format import find_quantized, quant_method, quantization_of
from ..checkpoint.types import Checkpoint
from ..errors import InputError
from . import compressed, float8, gptq_awq, modelopt, mxfp4
from .encoded_weight import WHERE_TO_GO, Found
from .quantizers import Quantizer, is_leftover, quantizer_of

_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt")
"""The methods whose sources nf4 reads, as config.json calls them."""
_NO_FORMAT = "a fmt that is no string"
"""The problem of a config.json that is damaged, and therefore no leftover."""
READS = (
    "float8, MXFP4, NVFP4 and compressed-tensors' integers of 4 and 8 bits (quant_method "
    f"{', '.join(repr(m) for m in _METHODS)})"
)


def find(checkpoint: Checkpoint, requantize: bool = False) -> Found:
    """Return the encoded weights of a source, and the tensors that belong to them.

    Args:
        requantize: whether GPTQ and AWQ are read as well.

    Raises:
        InputError: it is quantized in a way that nf4 does not read; or a tensor of a weight is
            missing, or has an impossible shape or dtype.
    """
    config = _config(checkpoint, requantize)
    found = Found()
    method = None if config is None else config.get("quant_method")
    if method == "mxfp4":
        mxfp4.find(checkpoint, found)
    if config is not None and method == "compressed-tensors":
        compressed.find(checkpoint, config, found)
    if config is not None and method in gptq_awq.METHODS:
        gptq_awq.find(checkpoint, config, found)
    if method in (None, "modelopt"):
        modelopt.find(checkpoint, found)
    if config is None and found.weights:
        config = {"quant_method": "modelopt"}
    float8.find(checkpoint, config, found)
    return found


def _config(checkpoint: Checkpoint, requantize: bool) -> Mapping[str, Any] | None:
    """Return the quantization_config that the tensors agree with, None for a source without.

    Where no tensor is quantized, a quantization_config is a leftover (of a QLoRA run whose adapter
    was merged, say), and it says nothing of them.

    Raises:
        InputError: it is quantized in another way, which the message names.
    """
    method, config = quant_method(checkpoint.config), quantization_of(checkpoint.config) or {}
    found = quantizer_of(checkpoint)
    problem = _problem(method, config, requantize)
    damaged = problem is not None and problem.endswith((compressed.NO_WEIGHTS, _NO_FORMAT))
    if problem is not None and not damaged and is_leftover(checkpoint):
        return None
    if found is not None and not _agrees(found, method):
        stores = f"{found.tensor!r} is how {found.program} stores weights"
        says = "says nothing" if method is None else f"says quant_method {method!r}"
        problem = f"{stores}, though config.json {says}"
    elif found is not None and problem is not None:
        problem = f"{problem}; {found.tensor!r} is how {found.program} stores weights"
    if problem is None:
        return None if method is None else config
    raise InputError(
        f"{checkpoint.root} is already quantized ({problem}): {_way_out(checkpoint, requantize)}. "
        f"The quantized sources that nf4 reads are {READS}"
    )


def _way_out(checkpoint: Checkpoint, requantize: bool) -> str:
    """Return what to do about a source that is refused."""
    if find_quantized(checkpoint):
        return "undo it first: nf4 dequantize"
    if not requantize and quant_method(checkpoint.config) in gptq_awq.METHODS:
        return (
            f"{WHERE_TO_GO}, which loses less. If there is none, --requantize decodes this one and "
            "rounds it a second time"
        )
    return WHERE_TO_GO


def _agrees(found: Quantizer, method: str | None) -> bool:
    """Return whether config.json names the program that the tensors show."""
    if found.program == modelopt.PROGRAM and method is None:
        return True  # ModelOpt says it in hf_quant_config.json
    if not found.methods:  # integers of no program's own spelling
        return method in ("compressed-tensors", "modelopt") or method not in (None, *_METHODS)
    return method in found.methods or (method is not None and method not in _METHODS)


def _problem(method: str | None, config: Mapping[str, Any], requantize: bool) -> str | None:
    """Return what nf4 does not read of a quantization_config, in words; None for nothing."""
    if requantize and method in gptq_awq.METHODS:
        return gptq_awq.problem(config)
    if method == "fp8":
        return _fp8_problem(config)
    if method == "compressed-tensors":
        return compressed.problem(config)
    if method is None or method in _METHODS:
        return None
    return f"quant_method {method!r} in config.json's quantization_config"


def _fp8_problem(config: Mapping[str, Any]) -> str | None:
    fmt = config.get("fmt", "e4m3")
    if not isinstance(fmt, str):
        return f"quant_method 'fp8' with {_NO_FORMAT}"
    if fmt not in ("e4m3", "float8_e4m3fn", "e5m2", "float8_e5m2"):
        return f"quant_method 'fp8' with fmt {fmt!r}"
    return None
