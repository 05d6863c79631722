"""The dtypes of safetensors files: their sizes, and their names in torch."""

from __future__ import annotations

from collections.abc import Mapping

ITEMSIZE: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Safetensors dtype -> bytes per element, for every dtype that nf4 can copy."""

TORCH_NAME: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors dtype -> torch's name, for the dtypes that the engines encode from and decode to."""

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""The float8 dtypes in which a checkpoint may store weights, by safetensors name."""

FLOAT64 = "F64"
"""The dtype that is read but never written: no loader of quantized models computes in it."""

SAFETENSORS_NAME: Mapping[str, str] = {torch: st for st, torch in TORCH_NAME.items()}
"""Torch's name -> safetensors dtype; the inverse of TORCH_NAME."""

STORAGE_NAME: Mapping[str, str] = {"uint8": "U8", **SAFETENSORS_NAME}
"""quant_storage (torch's name of a dtype) -> safetensors dtype of the packed tensor."""

CODE_BITS: Mapping[str, int] = {
    "e4m3": 8, "e5m2": 8, "e2m1": 4, "int8": 8, "offset8": 8, "offset4": 4, "uint8": 8,
}  # fmt: skip
"""Kind of the codes that a source may store its weights in -> bits of a code.
`codebook.code_values` has their values."""
