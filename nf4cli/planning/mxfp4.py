"""Read MXFP4, in which gpt-oss stores its experts.

`X_blocks` [experts, rows, groups, 16] holds two 4-bit floats in a byte, the first one in the low
bits.  `X_scales` [experts, rows, groups] holds the exponent of each group of 32.  The weight X is
[experts, 32 * groups, rows]: each expert's matrix is transposed, as transformers holds it.
"""

from __future__ import annotations

from ..checkpoint.types import Checkpoint, Encoding
from ..errors import InputError
from .encoded_weight import WHERE_TO_GO, EncodedWeight, Found, companion, require_shape

BLOCKS, SCALES = "_blocks", "_scales"
_GROUP, _BYTES = 32, 16


def find(checkpoint: Checkpoint, found: Found) -> None:
    """Add every MXFP4 weight of a source.

    Raises:
        InputError: scales are missing, or blocks or scales are of another dtype or shape.
    """
    for name, (shard, tensor) in checkpoint.tensors.items():
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in checkpoint.tensors:
            continue
        if name.endswith("_proj" + SCALES):
            raise InputError(
                f"{name} in {shard.path} has no {name.removesuffix(SCALES) + BLOCKS} beside it: "
                "the checkpoint is incomplete. Download it again"
            )
        if not name.endswith("_proj" + BLOCKS):
            continue
        if tensor.dtype != "U8" or len(tensor.shape) != 4 or tensor.shape[3] != _BYTES:
            raise InputError(
                f"{name} in {shard.path} is {tensor.dtype} {list(tensor.shape)}, expected U8 "
                f"[experts, rows, groups, {_BYTES}] of MXFP4: {WHERE_TO_GO}"
            )
        if not tensor.numel:
            raise InputError(f"{name} in {shard.path} has no elements: {WHERE_TO_GO}")
        experts, rows, groups, _ = tensor.shape
        scale = companion(checkpoint, name, name.removesuffix(BLOCKS) + SCALES, ("U8",))
        require_shape(scale, f"{name} {list(tensor.shape)}", [(experts, rows, groups)])
        columns = groups * _GROUP
        encoding = Encoding(
            "MXFP4", "e2m1", experts, rows, columns, (1, _GROUP), scale,
            exponents=True, transposed=True,
        )  # fmt: skip
        found.add(EncodedWeight(name, BLOCKS, "", (experts, columns, rows), encoding))
