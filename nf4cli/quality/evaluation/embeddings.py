"""Encoders: how far the embedding of a text moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError, UsageError
from . import statistics
from .models import libraries, opened
from .statistics import Figure, figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHORTEST = 40  # characters of a paragraph that counts

Progress = Callable[[str, int], None]

_WANTED = {
    "cosine_mean": statistics.mean("cosine"),
    "cosine_5": statistics.quantile("cosine", 0.05),
    "cosine_1": statistics.quantile("cosine", 0.01),
    "cosine_min": statistics.quantile("cosine", 0.0),
}


def pieces(documents: list[str], count: int) -> list[str]:
    """At most `count` paragraphs, evenly apart.

    Raises:
        UsageError: there is none.
    """
    found = [p.strip() for text in documents for p in text.split("\n\n")]
    found = [p for p in found if len(p) >= _SHORTEST]
    if not found:
        raise UsageError(f"the text has no paragraph of {_SHORTEST} characters: give more text")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[i] for i in np.unique(chosen)]


def embed(
    directory: Path, texts: list[str], tokenizer: Any, length: int, dtype: str, device: str,
    progress: Progress,
) -> NDArray[np.float32]:  # fmt: skip
    """float32 [texts, hidden]: the mean of the last hidden states over each text's tokens.

    Raises:
        InputError: the model cannot be loaded, or says something that is no number.
    """
    torch, _ = libraries()
    found = []
    with opened(directory, "encoder", dtype, device) as model:
        for text in texts:
            given = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
            out = model(**{name: value.to(device) for name, value in given.items()})
            states = out[0][0].float()
            if not torch.isfinite(states).all():
                raise InputError(
                    f"{directory} says something that is no number: its weights are damaged, or it "
                    "needs another --dtype"
                )
            found.append(states.mean(0).cpu().numpy())
            progress(str(directory), 1)
    return np.stack(found)


def compare(source: NDArray[np.float32], output: NDArray[np.float32]) -> dict[str, Figure]:
    """The cosine between the embeddings of each text.

    Raises:
        UsageError: they have different sizes.
    """
    if source.shape != output.shape:
        raise UsageError(
            f"the output's embeddings have {output.shape[1]:,} dimensions and the source's "
            f"{source.shape[1]:,}: it was not made from it"
        )
    a, b = source.astype(np.float64), output.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    blocks = [np.array([i]) for i in range(len(cosine))]
    return figures({"cosine": cosine}, blocks, _WANTED)
