"""Which families of models the selection rules are known to be right for, and whom to ask else.

families.json is written by scripts/survey_families.py, which compares the rules with what
transformers itself answers for every family it knows.
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
    """The content of families.json."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("families.json").read_bytes())
    return found


def consult(
    checkpoint: Checkpoint, always: bool = False, trust_remote_code: bool = False
) -> Answer | None:
    """What transformers says of a checkpoint, or None where the rules are enough.

    Args:
        checkpoint: with its tensors as the model holds them.
        always: ask even where the rules are known to be right (--exact).

    Raises:
        InputError: config.json names no family, or one that nobody here knows.
        MachineError: `always`, and transformers is not installed.
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
    if not always and _follows(config):
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
    known = survey()["differ"].get(family)
    why = (
        f"is known not to follow nf4's rules (see {', '.join(known)})" if known
        else "is none of the families that nf4's rules were compared with"
    )  # fmt: skip
    raise InputError(
        f"{checkpoint.root}: model_type {family!r} {why}. Install transformers, and nf4 asks it "
        "which modules it holds in 4 bit: pip install 'nf4cli[exact]'"
    )


def _follows(config: Mapping[str, Any]) -> bool:
    """Whether the family, and the families of its parts, are known to follow the rules."""
    known = survey()
    parts = [part for part in config.values() if isinstance(part, dict)]
    types = [part.get("model_type") for part in parts]
    asked = {t for t in types if isinstance(t, str)} & known["differ"].keys()
    return config["model_type"] in known["follow"] and not asked


def names_of(config: Mapping[str, Any], answer: Answer | None = None) -> Names:
    """What loaders call the modules of a family's checkpoints."""
    if is_diffusers_config(config):
        return Names()  # diffusers calls them what the files do
    family = config.get("model_type")
    known = survey()["names"].get(family, {}) if isinstance(family, str) else {}
    renamings = tuple((source, target) for source, target in known.get("renamed", ()))
    return Names(
        base_prefix=known.get("prefix", "model"),
        renamings=renamings,
        modules=answer.modules if answer else {},
    )
