"""Language models: what the source says of the next token, and how far the output is from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError, UsageError
from . import statistics
from .cache import Cache, key_of
from .models import libraries, opened
from .statistics import Figure, blocks_of, figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 64  # positions whose whole vocabulary is compared at a time

Progress = Callable[[str, int], None]
"""Told of windows that are done."""

_WANTED = {
    "perplexity_source": statistics.perplexity("source"),
    "perplexity_output": statistics.perplexity("output"),
    "perplexity_ratio": statistics.ratio("output", "source"),
    "kl_mean": statistics.mean("kl"),
    "kl_median": statistics.quantile("kl", 0.5),
    "kl_95": statistics.quantile("kl", 0.95),
    "kl_99": statistics.quantile("kl", 0.99),
    "kl_999": statistics.quantile("kl", 0.999),
    "kl_max": statistics.quantile("kl", 1.0),
    "top1": statistics.mean("same"),
}


class Source:
    """What a source says of some windows, from the cache, or by running it once.

    Args:
        directory: its ordinary weights.
        original: what it is known by in the cache.
        tokens: int64 [windows, length].
        settings: dtype and device.
    """

    def __init__(
        self, directory: Path, original: Path, tokens: NDArray[np.int64], cache: Cache,
        dtype: str, device: str, progress: Progress,
    ) -> None:  # fmt: skip
        torch, transformers = libraries()
        self._dtype, self._device = dtype, device
        settings = {
            "dtype": dtype, "device": device, "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        key = key_of(original, tokens, settings)
        found = cache.find(key)
        self.cached = found is not None
        if found is None:
            with opened(directory, "causal", dtype, device) as model:
                shape = (*tokens.shape, _vocabulary(model))
                with cache.writing(key, shape) as values:
                    for number, window in enumerate(tokens):
                        values[number] = _log_probabilities(model, window, directory).half().cpu()
                        progress("source", 1)
            found = cache.find(key)
            assert found is not None
        else:
            progress("source", len(tokens))
        self.tokens, self.said = tokens, found

    def compare(self, directory: Path, progress: Progress) -> dict[str, Figure]:
        """The figures of an output, or of any model with the same vocabulary.

        Raises:
            UsageError: its vocabulary is another.
            InputError: it says something that is no number.
        """
        torch, _ = libraries()
        count, length = len(self.tokens), self.tokens.shape[1] - 1
        # Filled in place: a small tensor that stays would keep the heap around it from shrinking.
        columns = {
            name: np.empty((count, length), np.float64)
            for name in ("source", "output", "kl", "same")
        }
        with opened(directory, "causal", self._dtype, self._device) as model:
            if _vocabulary(model) != self.said.shape[2]:
                raise UsageError(
                    f"{directory} has a vocabulary of {_vocabulary(model):,} tokens and the source "
                    f"one of {self.said.shape[2]:,}: it was not made from it"
                )
            for number, window in enumerate(self.tokens):
                mine = _log_probabilities(model, window, directory)
                following = torch.from_numpy(window[1:]).to(mine.device)
                for start in range(0, length, _ROWS):
                    stop = min(start + _ROWS, length)
                    there = torch.from_numpy(np.array(self.said[number, start:stop]))
                    there = there.to(mine.device).float().log_softmax(-1)
                    here, after = mine[start:stop], following[start:stop, None]
                    kl = (there.exp() * (there - here)).sum(-1).clamp(min=0)
                    for name, values in (
                        ("kl", kl),
                        ("same", there.argmax(-1) == here.argmax(-1)),
                        ("source", -there.gather(1, after)[:, 0]),
                        ("output", -here.gather(1, after)[:, 0]),
                    ):
                        columns[name][number, start:stop] = values.cpu().numpy()
                progress("output", 1)
        arrays = {name: column.reshape(-1) for name, column in columns.items()}
        return figures(arrays, blocks_of(count, length), _WANTED)


def vocabulary_of(directory: Path) -> int:
    """Tokens that a model speaks of, from its configuration."""
    _, transformers = libraries()
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    return int(config.get_text_config().vocab_size)


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _log_probabilities(model: Any, window: NDArray[np.int64], directory: Path) -> Any:
    """float32 tensor [length, vocabulary]."""
    torch, _ = libraries()
    given = torch.from_numpy(window[None]).to(model.device)
    said = model(input_ids=given, use_cache=False).logits[0].float()
    if not torch.isfinite(said).all():
        raise InputError(
            f"{directory} says something that is no number: its weights are damaged, or it needs "
            "another --dtype"
        )
    return said.log_softmax(-1)
