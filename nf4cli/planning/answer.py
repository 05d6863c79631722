"""The answer of transformers about a checkpoint: which tensors it would hold in 4 bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """What transformers says of a checkpoint when it is asked (transformers_answer.py).

    Attributes:
        version: version of the transformers that answered.
        quantized: names of the tensors whose modules it holds in 4 bit and that it loads as they
            are.
        rearranged: names of the tensors that it splits, merges or permutes while loading. That
            cannot be done with a packed weight.
        modules: path of a module in the checkpoint -> its paths in the model, where they differ.
            A weight that is split has several.
        tied: paths in the model of linear layers that share their weights with other modules, see
            `tied_linears`.
        float32: names of the tensors that it holds in float32, whatever 16-bit dtype is asked for.
    """

    version: str
    quantized: frozenset[str]
    rearranged: frozenset[str]
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    float32: frozenset[str] = frozenset()
