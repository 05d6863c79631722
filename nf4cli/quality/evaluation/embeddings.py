"""Compare the text embeddings of two encoders, the source and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...callbacks import Progress
from ...errors import InputError, UsageError
from . import statistics
from .models import libraries, opened
from .statistics import Figure, figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHORTEST = 40  # characters of a paragraph that counts

_FIGURES = {
    "cosine_mean": statistics.mean("cosine"),
    "cosine_5": statistics.quantile("cosine", 0.05),
    "cosine_1": statistics.quantile("cosine", 0.01),
    "cosine_min": statistics.quantile("cosine", 0.0),
}
_FIGURES_OF_TWO = {
    "cosine_other": statistics.mean("cosine_other"),
    "distance_ratio": statistics.share("distance", "distance_other"),
}


def pieces(documents: list[str], count: int) -> list[str]:
    """Return at most `count` paragraphs, evenly spread over the documents.

    Raises:
        UsageError: no paragraph is long enough.
    """
    paragraphs = [p.strip() for text in documents for p in text.split("\n\n")]
    paragraphs = [p for p in paragraphs if len(p) >= _SHORTEST]
    if not paragraphs:
        raise UsageError(f"the text has no paragraph of {_SHORTEST} characters: give more text")
    last = len(paragraphs) - 1
    chosen = np.linspace(0, last, min(count, len(paragraphs))).round().astype(int)
    return [paragraphs[i] for i in np.unique(chosen)]


def embed(
    directory: Path, texts: list[str], tokenizer: Any, length: int, dtype: str, device: str,
    progress: Progress,
) -> NDArray[np.float32]:  # fmt: skip
    """Return the mean of the last hidden states over each text's tokens.

    Args:
        directory: a model with ordinary weights.
        length: tokens that a longer text is cut to.
        progress: told the number of texts done.

    Returns:
        float32 [texts, hidden].

    Raises:
        InputError: a hidden state is NaN or infinite.
        InputError, UsageError, MachineError: see `opened`.
    """
    torch, _ = libraries()
    embeddings = []
    with opened(directory, "encoder", dtype, device) as model:
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
            outputs = model(**{name: value.to(device) for name, value in inputs.items()})
            states = outputs[0][0].float()
            if not torch.isfinite(states).all():
                raise InputError(
                    f"{directory} gives a NaN or an infinity: its weights are damaged, or it needs "
                    "another --dtype"
                )
            embeddings.append(states.mean(0).cpu().numpy())
            progress(str(directory), 1)
    return np.stack(embeddings)


def compare(
    source: NDArray[np.float32],
    output: NDArray[np.float32],
    other: NDArray[np.float32] | None = None,
) -> dict[str, Figure]:
    """Return the figures of the cosines between two models' embeddings of each text.

    Args:
        source, output: float32 [texts, hidden].
        other: of another output of the same source; None without one.

    Raises:
        UsageError: their shapes differ.
    """
    cosine = _cosines(source, output)
    columns, functions = {"cosine": cosine}, dict(_FIGURES)
    if other is not None:
        cosine_other = _cosines(source, other)
        columns |= {
            "cosine_other": cosine_other,
            "distance": 1 - cosine,
            "distance_other": 1 - cosine_other,
        }
        functions |= _FIGURES_OF_TWO
    return figures(columns, [np.array([i]) for i in range(len(cosine))], functions)


def _cosines(source: NDArray[np.float32], output: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return float64 [texts]."""
    if source.shape != output.shape:
        raise UsageError(
            f"the output's embeddings have {output.shape[1]:,} dimensions and the source's "
            f"{source.shape[1]:,}: it was not made from it"
        )
    a, b = source.astype(np.float64), output.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return cosines
