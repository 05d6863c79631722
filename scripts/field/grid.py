"""The rounding steps of the GGUF that a model was decoded from, and noise that breaks its grid.

Weights decoded from Q4_1 or Q4_K lie on a grid of 16 values for each 32 weights, which a format with
blocks of 32 and minima finds again almost exactly.  Noise as wide as one step of the grid takes that
advantage away: each weight may then lie anywhere that would have been rounded to the value it had.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def _half(raw: U8, at: int) -> F32:
    """Return the float16 at a byte of each block; raw is uint8 [blocks, bytes]."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view(np.float16).astype(np.float32)


def _q4_k(raw: U8) -> F32:
    """Return the steps of Q4_K's eight sub-blocks: d times their 6-bit scales, packed in 12 bytes."""
    packed = raw[:, 4:16]
    low = packed[:, 0:4] & 63
    high = (packed[:, 8:12] & 15) | ((packed[:, 0:4] >> 6) << 4)
    return _half(raw, 0) * np.concatenate([low, high], axis=1)


def _q6_k(raw: U8) -> F32:
    """Return the steps of Q6_K's sixteen sub-blocks: d times their int8 scales."""
    return _half(raw, 208) * np.abs(raw[:, 192:208].view(np.int8).astype(np.float32))


# ggml type -> (weights of a block, its bytes, the steps in it: float32 [blocks, steps]).
_STEPS = {
    "Q4_0": (32, 18, lambda raw: np.abs(_half(raw, 0))),
    "Q4_1": (32, 20, lambda raw: np.abs(_half(raw, 0))),
    "Q5_0": (32, 22, lambda raw: np.abs(_half(raw, 0))),
    "Q8_0": (32, 34, lambda raw: np.abs(_half(raw, 0))),
    "Q4_K": (256, 144, _q4_k),
    "Q6_K": (256, 210, _q6_k),
}


def steps(raw: U8, kind: str) -> F32:
    """Return how far apart neighbouring values of each weight's grid are.

    Args:
        raw: a tensor's bytes, uint8 [rows, bytes of a row].
        kind: ggml's name of its type.

    Returns:
        float32 [rows, columns].

    Raises:
        ValueError: a type that this does not know.
    """
    if kind not in _STEPS:
        raise ValueError(f"no rounding step is known for {kind}: add it to _STEPS")
    weights, size, of_blocks = _STEPS[kind]
    rows = len(raw)
    found = of_blocks(np.ascontiguousarray(raw).reshape(-1, size))
    return np.repeat(found, weights // found.shape[1], axis=1).reshape(rows, -1)


def dithered(weight: F32, step: F32, seed: int) -> F32:
    """Add noise that is uniform within half a step to either side.

    Args:
        weight, step: float32 [rows, columns].
        seed: the same seed gives the same noise.
    """
    noise = np.random.default_rng(seed).random(weight.shape, np.float32) - np.float32(0.5)
    return weight + noise * step
