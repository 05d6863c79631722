"""The recipe: everything about an output that a user may choose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

QUANT_TYPES = ("nf4", "fp4")

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

SCALES = ("absmax", "search")

METHODS = ("rtn", "gptq")

ON_NONFINITE = ("error", "keep")

TARGETS = ("transformers", "vllm", "unsloth")
"""Who shall load the output: transformers 4 and 5 as they are, or a loader that takes every expert
of a mixture as a 4-bit matrix of its own, which transformers 5 does not."""


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
