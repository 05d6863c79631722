"""Find the class of transformers that loads an output, with its head.

An Auto class takes the model's class from its own table, by config.json's model_type alone.  A
wrong one may load the model without its head, and say nothing of note.  auto_classes.json has the
tables of transformers 4 and 5, as scripts/survey_auto_classes.py wrote them down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..planning.families import names_of

_CLASS = re.compile(r"[A-Za-z]\w{0,100}", re.ASCII)
_AUTO = re.compile(r"AutoModel(For[A-Za-z0-9]{1,60})?", re.ASCII)
_HEADS = (
    "CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
    "MultipleChoice", "ImageClassification", "AudioClassification", "CTC",
)  # fmt: skip
"""Ends of class names that say which Auto class is meant, whatever the family."""
_LIKELY = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
)  # fmt: skip
"""Auto classes in the order in which they are taken where several would do."""
_HEAD_LAYERS = (
    ("qa_outputs", ("AutoModelForQuestionAnswering",)),
    ("score", ("AutoModelForSequenceClassification",)),
    ("classifier", ("AutoModelForSequenceClassification", "AutoModelForImageClassification",
                    "AutoModelForAudioClassification")),
    ("lm_head", _LIKELY[:5]),
    ("embed_out", _LIKELY[:5]),
    ("predictions", _LIKELY[:5]),
)  # fmt: skip
"""Name part of a head's tensor -> Auto classes that may have it."""


@cache
def survey() -> Mapping[str, Any]:
    """Return the content of auto_classes.json."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("auto_classes.json").read_bytes())
    return content


@cache
def _known_classes() -> frozenset[str]:
    """Return the names of all model classes of transformers that the survey found."""
    tables = survey()["auto"].values()
    mapped = (name for table in tables for names in table.values() for name in names.split())
    return frozenset([*mapped, *survey()["others"]])


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Return whether a model comes with code of its own, which loaders run only when allowed to."""
    return "auto_map" in config


def class_name(value: object) -> str | None:
    """Return a class's name that may be written into code; None for anything else."""
    return value if isinstance(value, str) and _CLASS.fullmatch(value) else None


def auto_class(config: Mapping[str, Any], tensors: Collection[str] = ()) -> str:
    """Return the class of transformers that loads a model: an Auto class, or the model's own.

    Args:
        config: its config.json.
        tensors: names of its tensors, asked for a head where config.json names no class.
    """
    names = config.get("architectures")
    name = class_name(names[0]) if isinstance(names, list) and names else None
    family = config.get("model_type")
    found = _of_own_code(config, name)
    if found is None and name and isinstance(family, str):
        # Where no Auto class gives a known class for its family, it is loaded by its own name.
        found = _surveyed(family, name) or (name if name in _known_classes() else None)
    if found is None and name:
        found = _by_name(name, needs_remote_code(config))
    return found or _by_tensors(config, tensors)


def _by_name(name: str, has_own_code: bool) -> str | None:
    """Return the class that loads a class which the survey did not find; None where its name says
    nothing of a head."""
    head = next((head for head in _HEADS if name.endswith(f"For{head}")), None)
    if head or "LMHead" in name:
        return f"AutoModelFor{head or 'CausalLM'}"
    # transformers has no class of that name where the model comes with its own code.
    return name if ("For" in name or "Head" in name) and not has_own_code else None


def _surveyed(family: str, name: str) -> str | None:
    """Return the Auto class that gives the class `name` for a family; None where none does."""
    for auto, families in survey()["auto"].items():
        if name in families.get(family, "").split():
            return str(auto)
    return None


def _of_own_code(config: Mapping[str, Any], name: str | None) -> str | None:
    """Return the Auto class for which auto_map names the model's class; None where there is none.

    Args:
        name: of the model's class, None where it is not known.
    """
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return None
    given = {
        key: ref.rpartition(".")[2]
        for key, ref in auto_map.items()
        if isinstance(key, str) and isinstance(ref, str) and _AUTO.fullmatch(key)
    }
    meant = [key for key, ref in given.items() if ref == name]
    headed = [key for key in meant if "For" in key and f"{name}".endswith(key[len("AutoModel") :])]
    return next(iter([*headed, *_by_likelihood(meant), *_by_likelihood(given)]), None)


def _by_likelihood(names: Iterable[str]) -> list[str]:
    """Return Auto classes, the likeliest first and AutoModel, which may drop a head, last."""
    likely = dict.fromkeys(("AutoModelForCausalLM", *_LIKELY))
    order = {name: place for place, name in enumerate(likely)}
    return sorted(names, key=lambda n: (n == "AutoModel", order.get(n, len(order)), n))


def _by_tensors(config: Mapping[str, Any], tensors: Collection[str]) -> str:
    """Return the Auto class of a model whose class is not known, by the head among its tensors."""
    family = str(config.get("model_type"))
    autos = {name for name, families in survey()["auto"].items() if family in families}
    parts = {part for name in tensors for part in name.split(".")}
    for layer, fitting in _HEAD_LAYERS:
        if layer in parts and (found := [auto for auto in fitting if auto in autos]):
            return found[0]
    prefix = names_of(config).base_prefix
    # A tied head is not in the files; the bare model's tensors have no prefix.
    if prefix and any(name.startswith(prefix + ".") for name in tensors):
        return next((auto for auto in _LIKELY[:5] if auto in autos), "AutoModel")
    return "AutoModel"
