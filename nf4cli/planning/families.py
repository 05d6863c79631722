"""Tell the families of models that the selection rules are right for, and ask transformers about
the others.

scripts/survey_families.py writes families.json: it compares the rules with the answer of
transformers for every family that transformers knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint.types import Checkpoint, is_diffusers_config
from ..errors import InputError, MachineError
from . import transformers_answer
from .answer import Answer
from .skip_list import Names


@cache
def survey() -> Mapping[str, Any]:
    """Return the content of families.json."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("families.json").read_bytes())
    return content


def consult(
    checkpoint: Checkpoint, always: bool = False, trust_remote_code: bool = False
) -> Answer | None:
    """Return what transformers says of a checkpoint, or None where the rules are enough.

    Args:
        checkpoint: with its tensors as the model holds them.
        always: ask even where the rules are known to be right (--exact).
        trust_remote_code: see `ask_transformers`.

    Raises:
        InputError: config.json names no family; or the rules are not known to be right for its
            family, and transformers is not installed or cannot build the model.
        MachineError: `always`, and transformers is not installed; or a library that the model
            needs is missing.
    """
    config = checkpoint.config
    if not config or is_diffusers_config(config):
        return None  # a bare file; a component of a diffusers pipeline
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise InputError(
            f"{checkpoint.root / 'config.json'} has no model_type, so nobody can tell which "
            "modules a loader expects in 4 bit: take config.json from the model's own repository"
        )
    if not always and _follows_rules(config):
        return None
    if transformers_answer.available():
        shapes = {name: tensor.shape for name, (_, tensor) in checkpoint.tensors.items()}
        return transformers_answer.ask_transformers(
            checkpoint.root, config, shapes, trust_remote_code
        )
    if always:
        raise MachineError(
            "--exact asks transformers, which is not installed: pip install 'nf4cli[exact]'"
        )
    differing = survey()["differ"].get(family)
    why = (
        f"is known not to follow nf4's rules (see {', '.join(differing)})" if differing
        else "is none of the families that nf4's rules were compared with"
    )  # fmt: skip
    raise InputError(
        f"{checkpoint.root}: model_type {family!r} {why}. Install transformers, and nf4 asks it "
        "which modules it holds in 4 bit: pip install 'nf4cli[exact]'"
    )


def _follows_rules(config: Mapping[str, Any]) -> bool:
    """Return whether a family is known to follow the rules, and no sub-config's family is known to
    differ from them."""
    families = survey()
    sub_configs = [value for value in config.values() if isinstance(value, dict)]
    types = [sub_config.get("model_type") for sub_config in sub_configs]
    differing = {t for t in types if isinstance(t, str)} & families["differ"].keys()
    return config["model_type"] in families["follow"] and not differing


def names_of(config: Mapping[str, Any], answer: Answer | None = None) -> Names:
    """Return the names by which loaders know the modules of a checkpoint.

    Args:
        config: its config.json.
        answer: of transformers, where it was asked.
    """
    if is_diffusers_config(config):
        return Names()  # diffusers calls them what the files do
    family = config.get("model_type")
    naming = survey()["names"].get(family, {}) if isinstance(family, str) else {}
    renamings = tuple((source, target) for source, target in naming.get("renamed", ()))
    return Names(
        base_prefix=naming.get("prefix", "model"),
        renamings=renamings,
        modules=answer.modules if answer else {},
    )
