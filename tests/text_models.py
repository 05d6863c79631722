"""Tiny random models with a tokenizer, for what runs text through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import MIXTURES, MODELS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix five dozen "
    "jugs of liquor. A calibration text has words, numbers such as 12 and 345, and "
    "punctuation; it runs on and on, and says little. "
)


def text(words: int, seed: int = 0) -> str:
    """So many words of TEXT in a random order, in paragraphs."""
    generator = torch.Generator().manual_seed(seed)
    known = TEXT.split()
    chosen = torch.randint(0, len(known), (words,), generator=generator).tolist()
    lines = [" ".join(known[i] for i in chosen[k : k + 30]) for k in range(0, words, 30)]
    return "\n\n".join(lines)


def tokenizer() -> Any:
    """Trained on TEXT; 512 entries at most, as the tiny models have."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>",
    )  # fmt: skip


def save(model: Any, root: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The model with the tokenizer; its matrices are large enough to say something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * (0.4 if "embed" in name else 0.12))
    model.to(dtype).save_pretrained(root)
    tokenizer().save_pretrained(root)
    return root


def make(name: str, root: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the random model that tiny_models calls `name`, with the tokenizer, to `root`."""
    tiny = {**MODELS, **MIXTURES}[name]
    torch.manual_seed(0)
    config = getattr(transformers, tiny.config)(**tiny.arguments)
    return save(getattr(transformers, tiny.model)(config), root, dtype)
