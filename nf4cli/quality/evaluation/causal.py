"""Compare the next-token probabilities of two language models, the source and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...callbacks import Progress
from ...errors import InputError, UsageError
from . import statistics
from .cache import Cache, key_of
from .models import libraries, opened
from .statistics import Figure, blocks_of, figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 64  # positions whose whole vocabulary is compared at a time

_FIGURES = {
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
_FIGURES_OF_TWO = {
    "kl_other": statistics.mean("kl_other"),
    "kl_ratio": statistics.share("kl", "kl_other"),
}

Columns = dict[str, "NDArray[np.float64]"]
"""What an output predicts beside its source at each position: float64 [windows, length - 1] each.

"kl" is the divergence, "same" 1.0 where the most likely token is the same, "source" and "output"
the negative log-likelihoods of the token that follows.
"""


def summarised(output: Columns, other: Columns | None = None) -> dict[str, Figure]:
    """Return the figures of an output, and how it stands to another one of the same source.

    Args:
        other: of the other output, at the same positions; None without one.
    """
    columns = {name: column.reshape(-1) for name, column in output.items()}
    functions = dict(_FIGURES)
    if other is not None:
        columns["kl_other"] = other["kl"].reshape(-1)
        functions |= _FIGURES_OF_TWO
    return figures(columns, blocks_of(*output["kl"].shape), functions)


class Source:
    """A source's log-probabilities of some windows, from the cache, or by running it once.

    Args:
        directory: the model with ordinary weights.
        original: the model as the user named it, for the cache.
        tokens: int64 [windows, length].
        cache: keeps the log-probabilities.
        dtype, device: that this model and those compared with it compute in and on.
        progress: told the number of windows done.

    Attributes:
        tokens: as given.
        log_probabilities: float16 [windows, length, vocabulary].

    Raises:
        InputError, UsageError, MachineError: see `opened`.
        InputError: a logit is NaN or infinite.
        OSError: the cache cannot be written.
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
        cached = cache.find(key)
        if cached is None:
            with opened(directory, "causal", dtype, device) as model:
                shape = (*tokens.shape, _vocabulary(model))
                with cache.writing(key, shape) as values:
                    for number, window in enumerate(tokens):
                        values[number] = _log_probabilities(model, window, directory).half().cpu()
                        progress("source", 1)
            cached = cache.find(key)
            assert cached is not None
        else:
            progress("source", len(tokens))
        self.tokens, self.log_probabilities = tokens, cached

    def compare(self, directory: Path, progress: Progress) -> Columns:
        """Compare an output, or any model with the same vocabulary, at each position.

        Args:
            progress: told the number of windows done.

        Raises:
            UsageError: its vocabulary has another size.
            InputError: a logit is NaN or infinite.
            InputError, UsageError, MachineError: see `opened`.
        """
        torch, _ = libraries()
        count, length = len(self.tokens), self.tokens.shape[1] - 1
        # Filled in place: a small tensor that stays would keep the heap around it from shrinking.
        columns = {
            name: np.empty((count, length), np.float64)
            for name in ("source", "output", "kl", "same")
        }
        with opened(directory, "causal", self._dtype, self._device) as model:
            vocabulary = self.log_probabilities.shape[2]
            if _vocabulary(model) != vocabulary:
                raise UsageError(
                    f"{directory} has a vocabulary of {_vocabulary(model):,} tokens and the source "
                    f"one of {vocabulary:,}: it was not made from it"
                )
            for number, window in enumerate(self.tokens):
                whole = _log_probabilities(model, window, directory)
                following = torch.from_numpy(window[1:]).to(whole.device)
                for start in range(0, length, _ROWS):
                    rows = slice(start, min(start + _ROWS, length))
                    source = torch.from_numpy(np.array(self.log_probabilities[number, rows]))
                    source = source.to(whole.device).float().log_softmax(-1)
                    output, after = whole[rows], following[rows, None]
                    kl = (source.exp() * (source - output)).sum(-1).clamp(min=0)
                    for name, values in (
                        ("kl", kl),
                        ("same", source.argmax(-1) == output.argmax(-1)),
                        ("source", -source.gather(1, after)[:, 0]),
                        ("output", -output.gather(1, after)[:, 0]),
                    ):
                        columns[name][number, rows] = values.cpu().numpy()
                progress("output", 1)
        return columns


def vocabulary_of(directory: Path) -> int:
    """Return the size of a model's vocabulary, from its configuration."""
    _, transformers = libraries()
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    return int(config.get_text_config().vocab_size)


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _log_probabilities(model: Any, window: NDArray[np.int64], directory: Path) -> Any:
    """Return the log-probabilities behind each token of a window.

    Args:
        window: int64 [length].
        directory: of the model, for the message.

    Returns:
        float32 tensor [length, vocabulary].

    Raises:
        InputError: a logit is NaN or infinite.
    """
    torch, _ = libraries()
    tokens = torch.from_numpy(window[None]).to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0].float()
    if not torch.isfinite(logits).all():
        raise InputError(
            f"{directory} gives a NaN or an infinity: its weights are damaged, or it needs another "
            "--dtype"
        )
    return logits.log_softmax(-1)
