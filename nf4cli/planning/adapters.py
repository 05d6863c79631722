"""Recognise an adapter (LoRA and its relatives) by the names of its tensors, and refuse it.

An adapter is no model: its small matrices are added to a base model's.  In 4 bit they would be an
output that no program loads, and an unmerged adapter inside a model's names is one as well.
"""

from __future__ import annotations

import re

from ..checkpoint.types import Checkpoint
from ..errors import InputError

_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_down|lora_up|lora\.(down|up))(\.|$)"  # PEFT, diffusers
    r"|^(lora_unet|lora_te\d?|lora_transformer|lora_prior|lora_text_encoder)_"  # kohya
    r"|\.(lora_magnitude_vector|dora_scale|lokr_w[12](_[ab])?|lokr_t2|hada_[wt][12](_[ab])?"
    r"|oft_(r|blocks|diag)|vera_lambda_[bd]|ia3_l|boft_[RS]|hra_u|loha_\w+)(\.|$)"
)
"""Matches the name of an adapter's tensor, in the spellings of the programs that train them."""
_OF_A_MODULE = re.compile(r"(.+)\.lora_(?:A|down)(?:\.[^.]+)?\.weight")
"""Matches the first of a LoRA's two matrices; the group is the module that it changes."""
_BASE = ".base_layer.weight"
"""What PEFT calls the weight of a module that it has put an adapter around."""

_MERGE = (
    "merge it into its base model first, in full precision, and give the merged model: "
    "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(OUT) with PEFT, "
    "or load_lora_weights(ADAPTER), fuse_lora(), unload_lora_weights() and save_pretrained(OUT) "
    "with diffusers"
)


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raise InputError if the tensors are an adapter's, or a model's with an unmerged adapter.

    A model of its own code may have such modules itself (Phi-4-multimodal): whoever knows that code
    is asked about them (families.py).
    """
    tensors = checkpoint.tensors
    found = [name for name in tensors if _ADAPTER.search(name)]
    if 2 * len(found) >= len(tensors) and not any(name.endswith(_BASE) for name in tensors):
        raise InputError(
            f"{_where(checkpoint)} is an adapter (LoRA or alike), and no model: {len(found):,} of "
            f"its {len(tensors):,} tensors are an adapter's, the first {found[0]!r}: {_MERGE}"
        )
    if "auto_map" in checkpoint.config or "phi4" in str(checkpoint.config.get("model_type")):
        return
    wrapped = [name for name in tensors if name.endswith(_BASE)]
    modules = [match[1] for name in found if (match := _OF_A_MODULE.fullmatch(name))]
    unmerged = [m for m in modules if f"{m}.weight" in tensors or m + _BASE in tensors]
    if wrapped or unmerged:
        example = (found or wrapped)[0]
        raise InputError(
            f"{_where(checkpoint)} holds a model with an adapter that is not merged: "
            f"{max(len(unmerged), len(wrapped)):,} modules have one, such as {example!r}. A loader "
            f"finds no weight for them: {_MERGE}"
        )


def _where(checkpoint: Checkpoint) -> str:
    """Return the path of what the user gave."""
    return str(checkpoint.shards[0].path if checkpoint.is_file else checkpoint.root)
