#!/usr/bin/env python3
"""Writes down which Auto class of transformers gives which model class, for every family.

    PYTHONPATH=. python scripts/survey_auto_classes.py [PYTHON ...]

Each PYTHON is an interpreter with a version of transformers in it, the oldest first (default:
this one).  Writes nf4cli/output/auto_classes.json, from which the line that loads an output is
made.  Of several Auto classes that give the same class, the one is taken that all versions have
and whose name says the task of the class.
"""

# ruff: noqa: PLC0415  - transformers is imported by the worker alone

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "nf4cli" / "output" / "auto_classes.json"

Pair = tuple[str, str]
"""A family (model_type) and a model class."""

ORDER = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM", "AutoModelForMaskedLM",
)  # fmt: skip
LAST = ("AutoModelForMultimodalLM", "AutoModelForPreTraining", "AutoModelForVision2Seq")
"""Taken where no other does: only one version has them, or they say no task."""


def survey_version() -> dict[str, Any]:
    """What this interpreter's transformers says."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    last_of = {config: family for family, config in CONFIG_MAPPING_NAMES.items()}
    auto = {}
    for name in vars(modeling_auto):
        if not name.startswith("AutoModel") or name.startswith("AutoModelWith"):
            continue
        mapping = getattr(vars(modeling_auto)[name]._model_mapping, "_model_mapping", {})
        families = {}
        for family, config in CONFIG_MAPPING_NAMES.items():
            # As _LazyAutoMapping looks a config class up, which several families may have.
            same = [f for f, c in CONFIG_MAPPING_NAMES.items() if c == config]
            found = next((f for f in (last_of[config], *same) if f in mapping), None)
            if found:
                given = mapping[found]
                families[family] = [given] if isinstance(given, str) else [*filter(None, given)]
        auto[name] = families
    classes = [
        name for name, module in transformers._class_to_module.items()
        if ".modeling_" in f".{module}" and is_model(name)
    ]  # fmt: skip
    return {"transformers": transformers.__version__, "auto": auto, "classes": sorted(classes)}


def is_model(name: str) -> bool:
    """Whether a class's name is that of a model to load."""
    is_base = "pretrained" in name.lower() or name.startswith(("Auto", "TF", "Flax"))
    return not is_base and ("For" in name or "Head" in name or name.endswith("Model"))


def pairs_of(version: Mapping[str, Any]) -> dict[Pair, set[str]]:
    """The Auto classes that give a model class, by family and class."""
    pairs: dict[Pair, set[str]] = {}
    for auto, families in version["auto"].items():
        for family, names in families.items():
            for name in names:
                pairs.setdefault((family, name), set()).add(auto)
    return pairs


def best(name: str, autos: Iterable[str]) -> str | None:
    """The Auto class to load a model class with; None where only AutoModel gives a class with a
    head, which would read as if the head were dropped."""
    has_head = "For" in name or "Head" in name
    order = {auto: place for place, auto in enumerate(ORDER)}

    def rank(auto: str) -> tuple[Any, ...]:
        named = auto == "AutoModel" if not has_head else name.endswith(auto[len("AutoModel") :])
        return (not named, auto in LAST, order.get(auto, len(order)), auto)

    fitting = sorted((a for a in autos if not (has_head and a == "AutoModel")), key=rank)
    return fitting[0] if fitting else None


def merged(versions: list[dict[str, Any]]) -> dict[str, Any]:
    """auto_classes.json from what each version said, the oldest first."""
    by_version = [pairs_of(version) for version in versions]
    auto: dict[str, dict[str, list[str]]] = {}
    for pair in sorted({pair for pairs in by_version for pair in pairs}):
        # Without one that all versions have, the class is loaded by its own name.
        having = [pairs[pair] for pairs in by_version if pair in pairs]
        found = best(pair[1], set.intersection(*having))
        if found:
            auto.setdefault(found, {}).setdefault(pair[0], []).append(pair[1])
    mapped = {name for families in auto.values() for names in families.values() for name in names}
    return {
        "transformers": sorted(version["transformers"] for version in versions),
        "auto": {
            name: {family: " ".join(names) for family, names in families.items()}
            for name, families in sorted(auto.items())
        },
        "others": sorted({c for v in versions for c in v["classes"]} - mapped),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        json.dump(survey_version(), sys.stdout)
        return
    versions = [
        json.loads(subprocess.run([python, __file__, "--worker"], check=True,
                                  stdout=subprocess.PIPE, text=True).stdout)
        for python in given.pythons
    ]  # fmt: skip
    OUTPUT.write_text(json.dumps(merged(versions), indent=1) + "\n")


if __name__ == "__main__":
    main()
