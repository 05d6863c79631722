"""Have a language model write text of its own, to calibrate it on where there is no other.

Documents begin with the tokens that the tokenizer puts before any text, and each next token is
drawn from the whole prediction: no temperature, nothing cut off. So the text is what the model
itself holds likely.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .evaluation.models import kind_of, libraries, opened
from .texts import special_tokens

TOKENS = 40_000
"""Default: a fifth more than a calibration takes, since text and windows do not fit exactly."""
_TOGETHER, _LONGEST = 32, 512  # documents that are written at a time, and tokens of one


def documents(
    directory: Path, tokenizer: Any, tokens: int, seed: int, dtype: str, device: str,
    progress: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """Return text that a model writes.

    Args:
        tokens: at least as many are written, the tokens of a document's beginning not counted.
        seed: of torch's random numbers; another machine may draw other text.
        progress: told the number of tokens written since it was last told, `tokens` in all at most.

    Raises:
        UsageError: the model does not predict a next token.
        InputError, MachineError: see `opened`.
    """
    torch, transformers = libraries()
    if kind_of(directory) != "causal":
        raise UsageError(
            f"{directory} is an encoder, which writes no text: give --calibration a text of yours"
        )
    texts: list[str] = []
    written = told = 0
    with opened(directory, "causal", dtype, device) as model, torch.random.fork_rng():
        torch.manual_seed(seed)
        first, last = _edges(model, tokenizer)
        config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=_LONGEST,
            eos_token_id=last or None, pad_token_id=last[0] if last else 0,
        )  # fmt: skip

        def count(ids: Any, scores: Any, **rest: Any) -> Any:
            nonlocal told
            progress(min(_TOGETHER, tokens - told))
            told = min(tokens, told + _TOGETHER)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        while written < tokens:
            start = torch.tensor([first] * _TOGETHER, device=model.device)
            found = model.generate(
                start, attention_mask=torch.ones_like(start), generation_config=config,
                stopping_criteria=transformers.StoppingCriteriaList([count]),
            )  # fmt: skip
            for row in found[:, len(first) :].tolist():
                end = next((i for i, token in enumerate(row) if token in last), len(row))
                text = tokenizer.decode(row[:end], skip_special_tokens=True)
                if text.strip():
                    texts.append(text)
                    written += end
            if not written:
                raise UsageError(
                    f"{directory} ends every document at its beginning: it cannot write"
                )
    return texts


def _edges(model: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a document begins with, and those of which one ends it.

    Where the tokenizer puts none before a text, that is its token for a beginning; without one,
    the model begins as after the end of another document.

    Raises:
        UsageError: it has neither.
    """
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    last = [ends] if isinstance(ends, int) else list(ends or [])
    first, _ = special_tokens(tokenizer, "a")
    if not first and tokenizer.bos_token_id is not None:
        first = [tokenizer.bos_token_id]
    first = first or last[:1]
    if not first:
        raise UsageError(
            "the tokenizer has no token for the beginning or the end of a text, so that the model "
            "cannot begin one: give --calibration a text of yours"
        )
    return first, last
