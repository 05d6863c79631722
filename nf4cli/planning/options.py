"""Check a recipe alone, before any source is read and anything numerical is imported."""

from __future__ import annotations

from ..errors import UsageError
from ..format.config import (
    BLOCKSIZES,
    EXPERT_LAYOUTS,
    METHODS,
    ON_NONFINITE,
    QUANT_TYPES,
    SCALES,
    SHARD_CUTS,
    TARGETS,
    QuantConfig,
)
from ..format.dtypes import SAFETENSORS_NAME, STORAGE_NAME


def check_options(config: QuantConfig) -> None:
    """Raise UsageError if a recipe has a value that is none, or values that do not go together."""
    for option, value, allowed in (
        ("--quant-type", config.quant_type, QUANT_TYPES),
        ("--blocksize", config.blocksize, BLOCKSIZES),
        ("--quant-storage", config.quant_storage, tuple(STORAGE_NAME)),
        ("--compute-dtype", config.compute_dtype, ("auto", *SAFETENSORS_NAME)),
        ("--dtype", config.dtype, ("auto", *SAFETENSORS_NAME)),
        ("--target", config.target, TARGETS),
        ("--on-nonfinite", config.on_nonfinite, ON_NONFINITE),
        ("--scale", config.scale, SCALES),
        ("--method", config.method, METHODS),
        ("expert_layout", config.expert_layout, EXPERT_LAYOUTS),
        ("shard_cuts", config.shard_cuts, SHARD_CUTS),
    ):
        if value not in allowed:
            raise UsageError(f"{option} {value} is not one of {', '.join(str(a) for a in allowed)}")
    if config.target == "vllm" and config.quant_storage != "uint8":
        raise UsageError(
            f"--quant-storage {config.quant_storage} does not go with --target vllm, which reads "
            "uint8 only"
        )
    check_shard_size(config.max_shard_size)


def check_shard_size(size: int) -> None:
    """Raise UsageError if a shard size, in bytes, is below 1 MB."""
    if size < 1_000_000:
        raise UsageError(f"--max-shard-size {size:,} bytes is below 1 MB")
