"""Estimate what rounding each module alone costs a language model, in KL divergence to itself.

To second order, the KL divergence that a change of the weights causes is half of its square in the
metric of the Fisher information. One backward pass gives an unbiased sample of that: draw the next
token of every position from the model's own prediction, and take the derivative of the drawn
tokens' log-likelihood along the change. Its mean is zero, and its mean square is twice the sum of
the positions' KL divergences (Amari, 1998; as used for weights by Singh and Alistarh, WoodFisher,
2020). So no second derivative is computed, and a module costs one product with its rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..callbacks import Progress
from ..errors import UsageError
from .evaluation.models import libraries, opened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engines.protocol import F32

Rounding = Callable[[str, "F32"], "F32"]
"""Rounds a weight as a conversion would: (name, float32 [rows, columns]) -> the decoded matrix."""

_MOST_LOGITS = 1 << 26  # float32 elements of a batch's logits, 268 MB; the pass holds four of them

DRAWS = 2
"""Draws of the next tokens for each window. The backward passes of one window share a forward."""


@dataclass(frozen=True)
class Sensitivity:
    """What rounding each module alone is estimated to cost.

    Attributes:
        samples: float64 [draws, windows] by weight: samples of the KL divergence a token, each as
            good as the square of one normal variable.
    """

    samples: Mapping[str, NDArray[np.float64]]

    def kl(self, name: str) -> float:
        """Return the estimated mean KL divergence a token of rounding one weight."""
        return float(self.samples[name].mean())


@dataclass(frozen=True)
class Checked:
    """Estimates beside what was measured.

    Attributes:
        estimated, measured: KL divergence a token by weight, each rounded alone.
        whole_estimated, whole_measured: of rounding them all.
    """

    estimated: Mapping[str, float]
    measured: Mapping[str, float]
    whole_estimated: float
    whole_measured: float

    @property
    def correlation(self) -> float | None:
        """Correlation of the logarithms of the modules' estimates and measurements; None where
        they are too few, or all alike."""
        pairs = [(self.estimated[n], self.measured[n]) for n in self.measured]
        logs = np.log(np.maximum(np.array(pairs), 1e-12))
        if len(logs) < 3 or not logs.std(0).all():
            return None
        return float(np.corrcoef(logs.T)[0, 1])

    @property
    def factor(self) -> float:
        """Measured over estimated, of the whole model."""
        return self.whole_measured / self.whole_estimated if self.whole_estimated else 1.0


def measure(
    directory: Path, names: Collection[str], tokens: NDArray[np.int64], rounding: Rounding,
    dtype: str, device: str, progress: Progress,
) -> tuple[Sensitivity, Checked]:  # fmt: skip
    """Estimate the cost of rounding each weight, and check some of the estimates.

    Args:
        directory: the model.
        names: of the weights.
        tokens: int64 [windows, length].
        progress: told the name of the step and the number of windows done, `steps` in all.

    Raises:
        InputError, UsageError, MachineError: see `opened`; or a weight is no linear layer's.
    """
    with opened(directory, "causal", dtype, device) as model:
        modules = _modules(model, names)
        torch, _ = libraries()
        with torch.inference_mode(False), torch.enable_grad():
            sensitivity = _sample(model, modules, tokens, rounding, progress)
        few = tokens[: max(1, len(tokens) // _CHECK_SHARE)]
        return sensitivity, _check(model, modules, few, rounding, sensitivity, progress)


_CHECKED, _CHECK_SHARE = 12, 4
"""Modules that are rounded alone to check the estimate, and the share of the windows for that."""


def steps(windows: int) -> int:
    """Return the windows that `measure` runs, backward passes counted as two."""
    few = max(1, windows // _CHECK_SHARE)
    return windows * (1 + 2 * DRAWS) + few * (_CHECKED + 2)


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


def _sample(
    model: Any, modules: Mapping[str, Any], tokens: NDArray[np.int64], rounding: Rounding,
    progress: Progress,
) -> Sensitivity:  # fmt: skip
    """Draw the samples of all modules."""
    torch, _ = libraries()
    model.requires_grad_(False)
    generator = torch.Generator(device="cpu").manual_seed(0)
    length = tokens.shape[1]
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    batch = max(1, _MOST_LOGITS // (length * vocabulary))
    samples: dict[str, list[NDArray[np.float64]]] = {name: [] for name in modules}
    with _watched(model, modules, rounding) as slopes:
        for start in range(0, len(tokens), batch):
            windows = tokens[start : start + batch]
            ids = torch.from_numpy(windows).to(model.device)
            log_probabilities = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            progress("forward", len(windows))
            probabilities = log_probabilities.detach().flatten(0, 1).exp().cpu()
            for draw in range(DRAWS):
                drawn = torch.multinomial(probabilities, 1, generator=generator)
                drawn = drawn.view(*windows.shape, 1).to(log_probabilities.device)
                log_probabilities.gather(2, drawn).sum().backward(retain_graph=draw + 1 < DRAWS)
                progress("backward", 2 * len(windows))
            for name, values in slopes.items():
                samples[name].append(np.square(values) / (2 * length))
                values.clear()
    return Sensitivity({name: np.concatenate(each, axis=1) for name, each in samples.items()})


@contextmanager
def _watched(
    model: Any, modules: Mapping[str, Any], rounding: Rounding
) -> Iterator[dict[str, list[list[float]]]]:
    """Yield, by weight, what each backward pass appends: each window's derivative along the error.

    The embeddings' output begins the graph, since no weight asks for a gradient.
    """
    slopes: dict[str, list[list[float]]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def forward(module: Any, args: Any, output: Any) -> None:
            error = _rounded(name, module, rounding) - _matrix(module).float()
            moved = args[0].detach().float() @ error.T

            def backward(gradient: Any) -> None:
                products = (gradient.float() * moved).flatten(1).sum(1)
                slopes[name].append(products.tolist())

            output.register_hook(backward)

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


def _check(
    model: Any, modules: Mapping[str, Any], tokens: NDArray[np.int64], rounding: Rounding,
    sensitivity: Sensitivity, progress: Progress,
) -> Checked:  # fmt: skip
    """Round some modules alone, then all, and measure the KL divergence."""
    before = [_log_probabilities(model, window, progress) for window in tokens]
    order = sorted(modules, key=sensitivity.kl)
    places = np.unique(np.linspace(0, len(order) - 1, _CHECKED).round().astype(int))
    measured = {}
    for place in places:
        name = order[place]
        with _replaced(name, modules[name], rounding):
            measured[name] = _kl(model, tokens, before, progress)
    for name, module in modules.items():
        _matrix(module).copy_(_rounded(name, module, rounding))
    return Checked(
        {name: sensitivity.kl(name) for name in measured}, measured,
        sum(map(sensitivity.kl, modules)), _kl(model, tokens, before, progress),
    )  # fmt: skip


@contextmanager
def _replaced(name: str, module: Any, rounding: Rounding) -> Iterator[None]:
    """Give a layer its rounded weight for a while."""
    weight = _matrix(module)
    own = weight.clone()
    weight.copy_(_rounded(name, module, rounding))
    try:
        yield
    finally:
        weight.copy_(own)


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
