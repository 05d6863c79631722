"""Measure how much each linear layer's outputs matter for what the whole model predicts.

Rounding costs KL divergence of the next token. To second order that is half the square of what it
changes, in the metric of the Fisher information (Amari, 1998): the mean of g g^T, where g is the
gradient of a random direction of the logits whose own second moments are diag(p) - p p^T, those of
the prediction. For a layer's weights this is taken as a Kronecker product, as K-FAC does (Martens
and Grosse, 2015) and YAQA (Tseng et al., 2025): the second moments of its inputs, each token
weighted by |g|^2, and those of the gradients by its outputs, here for FEEDBACK_ROWS rows at a time.

The direction is sqrt(p) z - p (sqrt(p) . z) with signs z of a fixed seed. A token drawn from the
prediction would do as well, but another machine, whose p differs in the last digits, could draw
another token, and a proof would find other figures.

A model without a prediction (an encoder) is measured by the direction of each last hidden state,
since embeddings are compared by their cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...checkpoint.file_io import sync
from ...engines.cpu import FEEDBACK_ROWS
from .walk import Walk

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_LOGITS = 1 << 24  # float32 elements of the logits that are held at a time, 67 MB
_WEIGHTS, _OUTPUTS = "weights:", "outputs:"


@dataclass(eq=False)
class LayerGradients:
    """What the gradients say of one linear layer.

    Attributes:
        weights: float32 tensor [windows, length], mean 1: how much each token's input counts.
        outputs: for each FEEDBACK_ROWS rows of the weight, float32 tensor [rows, rows]: the second
            moments of the gradients by its outputs.
    """

    weights: Any
    outputs: list[Any]


@dataclass(eq=False)
class _Sums:
    """What is added up of one layer.

    Attributes:
        tokens: float32 tensors [length], a window each: the squares of the gradients.
        outputs: see `LayerGradients`.
        group: the first layer that is given the same tensor.
    """

    group: str
    tokens: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def is_whole(self, windows: int) -> bool:
        """Return whether each window went through the layer once, with all its tokens."""
        return len(self.tokens) == windows and len({len(t) for t in self.tokens}) == 1

    def add(self, gradient: Any) -> None:
        """Add the gradients by a layer's outputs, float32 tensor [tokens, rows], a window's."""
        self.tokens.append(gradient.square().sum(1))
        for number, start in enumerate(range(0, gradient.shape[1], FEEDBACK_ROWS)):
            part = gradient[:, start : start + FEEDBACK_ROWS]
            product = part.T @ part
            if number == len(self.outputs):
                self.outputs.append(product)
            else:
                self.outputs[number] += product


def measure(
    walk: Walk, states: NDArray[np.float32], gradient: NDArray[np.float32],
    file: Callable[[int], Path], progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Go through the model and back, and write each block's gradients to a file.

    Args:
        walk: with its calls recorded.
        states: float32 [blocks + 1, windows, length, hidden]; [0] holds the first block's inputs,
            and each block's outputs are written behind it.
        gradient: float32 [windows, length, hidden], used for the gradients on their way back.
        file: gives the name of a block's file.
        progress: told a block's number, four times for each: forward, for its part of the time
            behind the blocks, and twice for the way back.
    """
    count = len(walk.blocks)
    for number in range(count):
        with walk.block(number):
            for i, window in enumerate(states[number]):
                states[number + 1, i] = walk.run(number, window)
        progress(number)
    with walk.tail() as after_blocks:
        for i, window in enumerate(states[count]):
            gradient[i] = _at_the_end(walk, after_blocks, window, seed=i)
            for number in range(count * i // len(gradient), count * (i + 1) // len(gradient)):
                progress(number)
    for number in reversed(range(count)):
        with walk.block(number), _watched(walk.linears(number)) as sums:
            for i, window in enumerate(states[number]):
                gradient[i] = walk.backward(number, window, gradient[i])
        _save(file(number), sums, len(gradient))
        progress(number)
        progress(number)


def _at_the_end(
    walk: Walk, after_blocks: Callable[[Any], Any], window: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """Return the gradient by the last block's output, float32 [length, hidden]."""
    import torch

    random = np.random.Generator(np.random.PCG64(seed))
    result = np.empty_like(window)
    step = max(1, _MOST_LOGITS // walk.vocabulary) if walk.predicts else len(window)
    for start in range(0, len(window), step):
        states = torch.from_numpy(np.array(window[None, start : start + step]))
        states = states.to(walk.device).requires_grad_()
        with torch.enable_grad():
            found = after_blocks(states)
            if not walk.predicts:
                found = torch.nn.functional.normalize(found, dim=-1)
        direction = _signs(random, tuple(found.shape)).to(found.device)
        if walk.predicts:
            p = found.detach().softmax(-1)
            roots = p.sqrt() * direction
            direction = roots - p * roots.sum(-1, keepdim=True)
        found.backward(direction)
        result[start : start + step] = states.grad[0].cpu().numpy()
    return result


def _signs(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return a float32 tensor of -1 and 1, the same on every machine."""
    import torch

    count = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(random.bytes(-(-count // 8)), np.uint8), count=count)
    return torch.from_numpy(bits.reshape(shape)).float() * 2 - 1


@contextmanager
def _watched(linears: Mapping[str, Any]) -> Iterator[dict[str, _Sums]]:
    """Yield the sums of the gradients that reach each layer's outputs, by weight."""
    sums: dict[str, _Sums] = {}
    last: list[Any] = [None, ""]  # an input, and the first layer that was given it

    def watch(name: str) -> Any:
        def forward(module: Any, args: Any, output: Any) -> None:
            if args[0] is not last[0]:
                last[:] = args[0], name
            own = sums.setdefault(name, _Sums(last[1]))

            def backward(gradient: Any) -> None:
                own.add(gradient.reshape(-1, gradient.shape[-1]).float())

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    handles = [m.register_forward_hook(watch(name)) for name, m in linears.items()]
    try:
        yield sums
    finally:
        last[0] = None
        for handle in handles:
            handle.remove()


def _save(path: Path, sums: Mapping[str, _Sums], windows: int) -> None:
    """Write a block's gradients; layers of one input get one weight for each token.

    A layer that not every window goes through is left out: it is calibrated without gradients.
    """
    import torch
    from safetensors.torch import save_file

    whole = {name: own for name, own in sums.items() if own.is_whole(windows)}
    groups: dict[str, Any] = {}
    for own in whole.values():
        share = _mean_one(torch.stack(own.tokens))
        groups[own.group] = groups[own.group] + share if own.group in groups else share
    tensors = {}
    for name, own in whole.items():
        tensors[f"{_WEIGHTS}{name}"] = _mean_one(groups[own.group])
        for number, moments in enumerate(own.outputs):
            tensors[f"{_OUTPUTS}{number:06}:{name}"] = moments
    save_file({key: value.cpu().clone() for key, value in tensors.items()}, path)
    sync(path)


def _mean_one(values: Any) -> Any:
    """Return a tensor over its mean; ones where that is 0, since no output matters more."""
    mean = values.mean()
    return values / mean if mean > 0 else values + 1


def load(path: Path) -> dict[str, LayerGradients]:
    """Return a block's gradients by weight."""
    from safetensors.torch import load_file

    found: dict[str, LayerGradients] = {}
    tensors = load_file(path)
    for key in sorted(tensors):  # outputs come in order, before weights
        kind, _, rest = key.partition(":")
        name = rest if kind + ":" == _WEIGHTS else rest.partition(":")[2]
        own = found.setdefault(name, LayerGradients(None, []))
        if kind + ":" == _WEIGHTS:
            own.weights = tensors[key]
        else:
            own.outputs.append(tensors[key])
    return found
