"""Estimate what rounding each module costs a language model, in KL divergence to itself.

Two figures for each module:

- Its share of what rounding all of them costs: the derivative of the KL divergence along the
  module's rounding error, taken in the rounded model and halved. The divergence is nearly a
  quadratic form of the errors, so the shares add up to it. (It is the attribution of Aumann and
  Shapley, which "integrated gradients" compute, Sundararajan and others, 2017; the derivative grows
  in proportion along the way, so one point of it is enough.) What errors of several modules do to
  each other is in it, half with each. Recipes are chosen by it. It is taken for several roundings,
  since much of a share is luck: whether this rounding's errors undo or add to those of others.
- What rounding it alone costs. To second order that is half of the error's square in the metric of
  the Fisher information. Draw the next token of every position from the model's own prediction, and
  take the derivative of the drawn tokens' log-likelihood along the error. Its mean is zero, and its
  mean square is twice the sum of the positions' KL divergences (Amari, 1998; as used for weights by
  Singh and Alistarh, WoodFisher, 2020). This is checked by rounding some modules alone.

No second derivative is computed, and a module costs one product with its rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..callbacks import Progress
from ..errors import InputError, UsageError
from .evaluation.models import libraries, opened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engines.protocol import F32

Rounding = Callable[[str, "F32"], "F32"]
"""Rounds a weight as a conversion would: (name, float32 [rows, columns]) -> the decoded matrix."""

_MOST_LOGITS = 1 << 24
"""Float32 elements of a batch's logits, 67 MB; the pass holds five of them, and the activations of
the batch: with 1 << 26, SmolLM2-135M took 8 GB."""


@dataclass(frozen=True)
class Sensitivity:
    """What rounding each module is estimated to cost, in KL divergence a token.

    Attributes:
        alone: float64 [windows] by weight: of rounding it alone, each as good as the square of one
            normal variable.
        shares: float64 [windows] by rounding and weight: its share of `whole`.
        whole: float64 [windows] by rounding: measured, of rounding all weights.
        reference: the rounding that `alone` is of.
    """

    alone: Mapping[str, NDArray[np.float64]]
    shares: Mapping[int, Mapping[str, NDArray[np.float64]]]
    whole: Mapping[int, NDArray[np.float64]]
    reference: int

    def kl_alone(self, name: str) -> float:
        """Return the estimated mean of rounding one weight alone."""
        return float(self.alone[name].mean())

    def share(self, name: str, rounding: int) -> float:
        """Return the mean share of one weight: below zero where its error undoes others'."""
        return float(self.shares[rounding][name].mean())

    def factor(self, rounding: int) -> float:
        """Return measured over the sum of the shares, of the whole model."""
        estimated = sum(self.share(name, rounding) for name in self.shares[rounding])
        return float(self.whole[rounding].mean()) / estimated if estimated > 0 else 1.0


@dataclass(frozen=True)
class Checked:
    """Estimates beside what was measured.

    Attributes:
        estimated, measured: KL divergence a token by weight, each rounded alone.
        factor: of rounding them all: measured over estimated.
    """

    estimated: Mapping[str, float]
    measured: Mapping[str, float]
    factor: float

    @property
    def correlation(self) -> float | None:
        """Correlation of the logarithms of the modules' estimates and measurements; None where
        they are too few, or all alike."""
        pairs = [(self.estimated[n], self.measured[n]) for n in self.measured]
        logs = np.log(np.maximum(np.array(pairs), 1e-12))
        if len(logs) < 3 or not logs.std(0).all():
            return None
        return float(np.corrcoef(logs.T)[0, 1])


def measure(
    directory: Path, names: Collection[str], tokens: NDArray[np.int64],
    roundings: Mapping[int, Rounding], reference: int, dtype: str, device: str, progress: Progress,
) -> tuple[Sensitivity, Checked]:  # fmt: skip
    """Estimate the cost of rounding each weight, and check some of the estimates.

    Args:
        directory: the model.
        names: of the weights.
        tokens: int64 [windows, length].
        roundings: what is estimated, by a number of the caller's.
        reference: the number of the one that is checked.
        progress: told the name of the step and the number of windows done, `steps` in all.

    Raises:
        InputError, UsageError, MachineError: see `opened`; or a weight is no linear layer's, or a
            prediction is not finite.
    """
    with opened(directory, "causal", dtype, device) as model:
        modules = _modules(model, names)
        torch, _ = libraries()
        with torch.inference_mode(False), torch.enable_grad():
            sensitivity = _sample(model, modules, tokens, roundings, reference, progress)
        few = tokens[: max(1, len(tokens) // _CHECK_SHARE)]
        return sensitivity, _check(model, modules, few, roundings[reference], sensitivity, progress)


_CHECKED, _CHECK_SHARE = 12, 4
"""Modules that are rounded alone to check the estimate, and the share of the windows for that."""


def steps(windows: int, roundings: int, weights: int) -> int:
    """Return the windows that `measure` runs, backward passes counted as two."""
    few = max(1, windows // _CHECK_SHARE)
    return windows * 3 * (1 + roundings) + few * (1 + min(weights, _CHECKED))


def _modules(model: Any, names: Collection[str]) -> dict[str, Any]:
    """Return the linear module of each weight.

    A checkpoint's names may lack a prefix that the model's have, or have one of their own.

    Raises:
        UsageError: a weight is no linear layer's.
    """
    torch, transformers = libraries()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    by_tail: dict[str, list[str]] = {}
    for path in linears:
        parts = path.split(".")
        for start in range(len(parts)):
            by_tail.setdefault(".".join(parts[start:]), []).append(path)
    found = {}
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        path = next((p[0] for tail in tails if len(p := by_tail.get(tail, [])) == 1), None)
        if path is None:
            raise UsageError(
                f"{name} is no linear layer of {type(model).__name__}, so that a text cannot "
                "measure it: leave --calibration out, and the error of its weights counts"
            )
        found[name] = linears[path]
    return found


def _matrix(module: Any) -> Any:
    """Return a layer's weight as [out, in]; Conv1D holds the transpose."""
    torch, _ = libraries()
    return module.weight if isinstance(module, torch.nn.Linear) else module.weight.T


def _rounded(name: str, module: Any, rounding: Rounding) -> Any:
    """Return a layer's weight as it decodes, [out, in] float32 on the layer's device."""
    torch, _ = libraries()
    weight = _matrix(module).detach()
    decoded = rounding(name, np.ascontiguousarray(weight.float().cpu().numpy()))
    return torch.from_numpy(decoded).to(weight.device)


def _error_product(name: str, module: Any, rounding: Rounding, inputs: Any) -> Any:
    """Return what a layer's rounding error makes of its inputs, float32 [..., out]."""
    error = _rounded(name, module, rounding) - _matrix(module).float()
    return inputs.float() @ error.T


def _sample(
    model: Any, modules: Mapping[str, Any], tokens: NDArray[np.int64],
    roundings: Mapping[int, Rounding], reference: int, progress: Progress,
) -> Sensitivity:  # fmt: skip
    """Take the derivatives along all modules' errors, in the model and in the rounded ones.

    Raises:
        InputError: a prediction is not finite.
    """
    torch, _ = libraries()
    model.requires_grad_(False)
    generator = torch.Generator(device="cpu").manual_seed(0)
    length = tokens.shape[1]
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    batch = max(1, _MOST_LOGITS // (length * vocabulary))
    alone: dict[str, list[float]] = {name: [] for name in modules}
    shares: dict[int, dict[str, list[float]]] = {r: {n: [] for n in modules} for r in roundings}
    whole: dict[int, list[float]] = {r: [] for r in roundings}
    for start in range(0, len(tokens), batch):
        windows = tokens[start : start + batch]
        ids = torch.from_numpy(windows).to(model.device)
        with _watched(model, modules, roundings[reference], at=0) as slopes:
            own = _drawn(model, ids, generator, progress)
        for name, values in slopes.items():
            alone[name] += [value * value / (2 * length) for value in values]
        for number, rounding in roundings.items():
            with _watched(model, modules, rounding, at=1) as slopes:
                divergence = _diverged(model, ids, own, progress)
            for name, values in slopes.items():
                shares[number][name] += [value / (2 * length) for value in values]
            whole[number] += (divergence / length).tolist()
    return Sensitivity(
        {name: np.array(values) for name, values in alone.items()},
        {r: {n: np.array(values) for n, values in by.items()} for r, by in shares.items()},
        {number: np.array(values) for number, values in whole.items()},
        reference,
    )


def _drawn(model: Any, ids: Any, generator: Any, progress: Progress) -> Any:
    """Run back the log-likelihood of tokens drawn from the model's own prediction.

    Args:
        ids: int64 [windows, length].

    Returns:
        Float32 log-probabilities [windows, length, vocabulary].

    Raises:
        InputError: a prediction is not finite.
    """
    torch, _ = libraries()
    own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    progress("forward", len(ids))
    if not torch.isfinite(own).all():
        raise InputError(
            "the model predicts a NaN or an infinity on the text: its weights are damaged. "
            "Mend the source, or leave --calibration out"
        )
    probabilities = own.detach().flatten(0, 1).exp().cpu()
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    own.gather(2, drawn.view(*ids.shape, 1).to(own.device)).sum().backward()
    progress("backward", 2 * len(ids))
    return own.detach()


def _diverged(model: Any, ids: Any, own: Any, progress: Progress) -> Any:
    """Run back the KL divergence from the log-probabilities of the unchanged model.

    Args:
        ids: int64 [windows, length].
        own: float32 [windows, length, vocabulary].

    Returns:
        Float32 [windows]: the sum over a window's positions.
    """
    torch, _ = libraries()
    rounded = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    progress("forward", len(ids))
    divergence = torch.nn.functional.kl_div(
        rounded, own, reduction="none", log_target=True
    ).sum((1, 2))  # fmt: skip
    divergence.sum().backward()
    progress("backward", 2 * len(ids))
    return divergence.detach()


@contextmanager
def _watched(
    model: Any, modules: Mapping[str, Any], rounding: Rounding, at: int
) -> Iterator[dict[str, list[float]]]:
    """Yield, by weight, what a backward pass appends: each window's derivative along the error.

    The embeddings' output begins the graph, since no weight asks for a gradient.

    Args:
        at: 0 to leave the model as it is, 1 to add its error to each weight: what a layer gives
            is then moved by the error's product. The backward pass makes the error again, so
            that no second model is held.
    """
    torch, _ = libraries()
    slopes: dict[str, list[float]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def forward(module: Any, args: Any, output: Any) -> Any:
            product = partial(_error_product, name, module, rounding)

            def backward(gradient: Any) -> None:
                products = (gradient.float() * moved.detach()).flatten(1).sum(1)
                slopes[name].extend(products.tolist())

            if at:
                moved = torch.utils.checkpoint.checkpoint(product, args[0], use_reentrant=False)
                output = output + moved.to(output.dtype)
            else:
                moved = product(args[0].detach())
            output.register_hook(backward)
            return output

        return forward

    handles = [m.register_forward_hook(watch(name)) for name, m in modules.items()]
    handles.append(
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.detach().requires_grad_()
        )
    )
    try:
        yield slopes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _moved(name: str, module: Any, rounding: Rounding) -> Iterator[None]:
    """Have a layer give for a while what it would with its rounded weight."""

    def forward(module: Any, args: Any, output: Any) -> Any:
        return output + _error_product(name, module, rounding, args[0]).to(output.dtype)

    handle = module.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


def _check(
    model: Any, modules: Mapping[str, Any], tokens: NDArray[np.int64], rounding: Rounding,
    sensitivity: Sensitivity, progress: Progress,
) -> Checked:  # fmt: skip
    """Round some modules alone, and measure the KL divergence."""
    before = [_log_probabilities(model, window, progress) for window in tokens]
    order = sorted(modules, key=sensitivity.kl_alone)
    places = np.unique(np.linspace(0, len(order) - 1, _CHECKED).round().astype(int))
    measured = {}
    for place in places:
        name = order[place]
        with _moved(name, modules[name], rounding):
            measured[name] = _kl(model, tokens, before, progress)
    estimated = {name: sensitivity.kl_alone(name) for name in measured}
    return Checked(estimated, measured, sensitivity.factor(sensitivity.reference))


def _kl(model: Any, tokens: NDArray[np.int64], before: Sequence[Any], progress: Progress) -> float:
    """Return the mean KL divergence a token from the log-probabilities before a change."""
    total = 0.0
    for window, old in zip(tokens, before, strict=True):
        new = _log_probabilities(model, window, progress)
        total += float((old.float().exp() * (old.float() - new.float())).sum(-1).mean())
    return total / len(tokens)


def _log_probabilities(model: Any, window: NDArray[np.int64], progress: Progress) -> Any:
    """Return float32 [length, vocabulary]."""
    torch, _ = libraries()
    ids = torch.from_numpy(window[None]).to(model.device)
    with torch.inference_mode():
        result = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    progress("check", 1)
    return result
