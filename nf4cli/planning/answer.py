"""What transformers says of a checkpoint, where it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """What transformers itself says of a checkpoint (transformers_answer.py).

    Attributes:
        version: of transformers.
        quantized: tensors whose modules it holds in 4 bit, and that arrive there as they are.
        rearranged: tensors that it splits, merges or permutes while loading, which a packed
            weight cannot go through.
        modules: path in the checkpoint -> paths in the model, where they differ: several for a
            weight that is split.
    """

    version: str
    quantized: frozenset[str]
    rearranged: frozenset[str]
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
