"""Read NVFP4 as NVIDIA's ModelOpt spells it.

`X.weight` holds two 4-bit floats in a byte, the first one in the low bits; `X.weight_scale` (float8
e4m3) a factor for each group of 16; `X.weight_scale_2` a float32 that every factor is multiplied
by.  ModelOpt's float8 is that of float8.py.
"""

from __future__ import annotations

from ..checkpoint.types import Checkpoint, Encoding
from ..errors import InputError
from .encoded_weight import (
    WHERE_TO_GO,
    EncodedWeight,
    Found,
    companion,
    refuse_orphans,
    require_shape,
)

PROGRAM = "NVFP4"
"""What quantizers.py calls it."""
_UNIT, _SCALE, _SMOOTHING = "_scale_2", "_scale", ".pre_quant_scale"
GROUP = 16


def find(checkpoint: Checkpoint, found: Found) -> None:
    """Add every NVFP4 weight of a source.

    Raises:
        InputError: scales are missing, or of another dtype or shape; or the inputs of a layer are
            scaled as well, which a weight alone cannot hold.
    """
    for name, (shard, tensor) in checkpoint.tensors.items():
        if name.endswith(_SMOOTHING):
            raise InputError(
                f"{name} in {shard.path} scales the inputs of a layer (AWQ or SmoothQuant), which "
                f"a weight alone cannot hold: {WHERE_TO_GO}"
            )
        if tensor.dtype != "U8" or name + _UNIT not in checkpoint.tensors:
            continue
        if len(tensor.shape) not in (2, 3) or not tensor.numel:
            raise InputError(
                f"{name} in {shard.path} is U8 {list(tensor.shape)}, expected a matrix of NVFP4, "
                f"or a stack of them: {WHERE_TO_GO}"
            )
        *stack, rows, half = tensor.shape
        columns = 2 * half
        scale = companion(checkpoint, name, name + _SCALE, ("F8_E4M3",))
        owner = f"{name} {list(tensor.shape)}"
        require_shape(scale, owner, [(*stack, rows, -(-columns // GROUP))])
        unit = companion(checkpoint, name, name + _UNIT, ("F32",))
        require_shape(unit, owner, [(), (1,)])
        encoding = Encoding(
            PROGRAM, "e2m1", stack[0] if stack else 1, rows, columns, (1, GROUP), scale, unit=unit
        )
        found.add(EncodedWeight(name, "", "", (*stack, rows, columns), encoding))
    refuse_orphans(checkpoint, found, {".weight" + _UNIT: "NVFP4 weight"})
