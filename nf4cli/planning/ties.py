"""Tell which linear layers a model ties to other weights, and what it keeps in float32.

scripts/survey_ties.py writes ties.json: it asks every model class of transformers.  A tied layer
has no weight in the files.  So they do not show that the model has it, and the skip list must name
it all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .answer import Answer
from .model_config import config_items
from .selection import WEIGHT, module_path
from .skip_list import Names

_HEAD = "lm_head"
_LIST = ".*"
"""End of an entry that stands for every layer of a list."""


@cache
def survey() -> Mapping[str, Any]:
    """Return the content of ties.json."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("ties.json").read_bytes())
    return content


def absent_tied(
    config: Mapping[str, Any], answer: Answer | None, tensors: Iterable[str], names: Names
) -> list[str]:
    """Return the tied linear layers of a model that have no weight of their own in the files.

    Args:
        config: config.json.  Without `architectures`, every class of the family is looked at.
        answer: of transformers, where it was asked.
        tensors: names of all tensors of the checkpoint.
        names: what loaders call its modules.

    Returns:
        Paths in the model, sorted; `LIST.*` for all layers of a list.
    """
    tied = _tied(config) | (answer.tied if answer else frozenset())
    modules = [module_path(name) for name in tensors if name.endswith(WEIGHT)] if tied else []
    present = {form for module in modules for form in names.forms(module)}
    return sorted(path for path in tied if not _is_present(path, present))


def random_head_note(config: Mapping[str, Any], absent: Iterable[str]) -> list[str]:
    """Return a note about a head that has no weight and is tied to none, in a list; [] for none.

    Args:
        absent: see `absent_tied`.
    """
    if config.get("tie_word_embeddings") is not False or _HEAD not in absent:
        return []
    return [
        f"config.json says tie_word_embeddings false, but there is no {_HEAD}.weight: a loader "
        "fills the output head with random numbers, of the source and of the output. If the head "
        "is the embedding, set tie_word_embeddings to true; otherwise a file is missing"
    ]


def _tied(config: Mapping[str, Any]) -> frozenset[str]:
    family = config.get("model_type")
    classes = survey()["tied"].get(family, {}) if isinstance(family, str) else {}
    given = config.get("architectures")
    architectures = given if isinstance(given, list) else []
    named = [n for n in architectures if isinstance(n, str)] if architectures else list(classes)
    return frozenset(path for name in named for path in classes.get(name, ()))


def _is_present(path: str, present: set[str]) -> bool:
    """Return whether the files have a tied layer's weight, or those of a list's layers.

    A list that is tied has at most the weight of its first layer.
    """
    if not path.endswith(_LIST):
        return path in present
    start = path.removesuffix("*")
    return len({m[len(start) :].split(".")[0] for m in present if m.startswith(start)}) > 1


def float32_test(
    config: Mapping[str, Any], answer: Answer | None, model_dtype: str, names: Names
) -> Callable[[str], bool]:
    """Return a function that tells by a tensor's name whether the model always holds it in float32.

    Args:
        model_dtype: safetensors dtype of the model: none has exceptions from float32.
    """
    tables = {"BF16": ("float32",), "F16": ("float32", "float32_in_float16")}.get(model_dtype, ())
    families = {v for k, v in config_items(config) if k == "model_type" and isinstance(v, str)}
    parts = {p for t in tables for family in families for p in survey()[t].get(family, ())}
    pattern = re.compile("|".join(part.replace("*", ".*") for part in sorted(parts)))
    answered = answer.float32 if answer and tables else frozenset()

    def is_float32(name: str) -> bool:
        if name in answered:
            return True
        module, _, leaf = name.rpartition(".")
        return bool(parts) and any(pattern.search(f"{f}.{leaf}") for f in names.forms(module))

    return is_float32
