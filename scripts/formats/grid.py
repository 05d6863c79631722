"""Noise that takes decoded weights off the grid of the GGUF that they were decoded from.

Weights decoded from Q4_1 lie on a grid of 16 values for each 32 weights, which a format with blocks
of 32 and minima finds again almost exactly.  Noise as wide as one step of the grid takes that
advantage away: each weight may then lie anywhere that would have been rounded to its value.
"""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def steps(raw: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> F32:
    """Return how far apart neighbouring values of each weight's grid are.

    Args:
        raw: a tensor's bytes, uint8 [rows, bytes of a row].  A block begins with its step, float16.
        kind: Q4_1.

    Returns:
        float32 [rows, columns].
    """
    if kind != gguf.GGMLQuantizationType.Q4_1:
        raise ValueError(f"{kind.name} is not Q4_1, whose blocks begin with their step")
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.ascontiguousarray(raw).reshape(-1, size)
    found = np.abs(np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32))
    return np.repeat(found, weights, axis=1).reshape(len(raw), -1)


def dithered(weight: F32, step: F32, seed: int) -> F32:
    """Add noise that is uniform within half a step to either side.

    Args:
        weight, step: float32 [rows, columns].
        seed: the same seed gives the same noise.
    """
    noise = np.random.default_rng(seed).random(weight.shape, np.float32) - np.float32(0.5)
    return weight + noise * step
