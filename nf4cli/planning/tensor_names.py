"""Compare the names of a source's tensors with those that the model's family has.

A wrapper around a model adds its own parts to every name: torch.compile `_orig_mod`, DDP `module`,
PEFT `base_model.model`, Lightning the attribute that holds the model.  transformers finds no weight
under such a name, and fills the model with random numbers.  So they are taken off; the manifest has
the stored name of each tensor.  Names that do not fit the family in another way are refused.

layer_names.json lists, for each family that the rules are right for, what its linear layers are
called and where its numbered layers lie; scripts/survey_families.py writes it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint.types import Checkpoint, is_diffusers_config
from ..errors import InputError

_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Parts that torch and Lightning put into names, anywhere; no model has a module of such a name."""
_OUTER = ("base_model.model.", "module.")
"""What PEFT and DDP put before every name."""
_HOLDERS = frozenset(
    (
        "module base_model model _model pretrained_model wrapped_model hf_model net network llm lm "
        "policy actor student state_dict"
    ).split()
)
"""Names of the attributes in which wrappers and training scripts hold a model.  Any other first
part may be that of a class which layer_names.json does not know."""
_MOST_HOLDERS = 4
_FEWEST_LAYERS = 3
"""Kinds of linear layers from which on a source is taken for a whole model, and no fragment."""


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    """Return family -> {"layers": last parts of the paths of its linear layers, "places": paths
    before the first number}, from layer_names.json."""
    content = json.loads(Path(__file__).with_name("layer_names.json").read_bytes())
    return {family: entry for entry in content for family in entry["families"]}


def _families(config: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return what is known of a config's family and of those in its sub-configs.

    Returns None where one is not known, or the model has code of its own.
    """
    if not config or is_diffusers_config(config) or "auto_map" in config:
        return None
    subs = [value for value in config.values() if isinstance(value, dict)]
    types = [part["model_type"] for part in (config, *subs) if "model_type" in part]
    known = [_table().get(t) if isinstance(t, str) else None for t in types]
    found = [entry for entry in known if entry is not None]
    return found if found and len(found) == len(known) else None


def knows(config: Mapping[str, Any]) -> bool:
    """Return whether the names of the layers of a config's families are recorded."""
    return _families(config) is not None


def names_in_model(checkpoint: Checkpoint) -> dict[str, str]:
    """Return stored name -> name in the model, of every tensor whose name a wrapper has changed.

    Raises:
        InputError: two tensors would have the same name.
    """
    config = checkpoint.config
    if not config:
        return {}  # nobody knows what the names should be
    names = {name: _unwrapped(name) for name in checkpoint.tensors}
    prefix = _outer(list(names.values()), config)
    names = {name: inner[len(prefix) :] for name, inner in names.items()}
    twice = next((n for n, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        both = [stored for stored, name in names.items() if name == twice]
        raise InputError(
            f"{checkpoint.root} holds both {both[0]!r} and {both[1]!r}, which are the same tensor "
            f"without what a wrapper (torch.compile, DDP, PEFT) put into the names: {twice!r}. "
            "Remove the stale one"
        )
    return {stored: name for stored, name in names.items() if stored != name}


def _unwrapped(name: str) -> str:
    """Return a tensor's name without the parts that are a wrapper's wherever they are."""
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _outer(names: list[str], config: Mapping[str, Any]) -> str:
    """Return the prefix that all names share and the family's names do not have; "" for none."""
    families = _families(config)
    if families is None:
        return next((p for p in _OUTER if _all(names, p)), "") if "auto_map" not in config else ""
    places = {place for entry in families for place in entry["places"]}
    prefix, rest = "", names
    for _ in range(_MOST_HOLDERS + 1):
        if not places or _places(rest) & places:
            return prefix
        part = rest[0].partition(".")[0] + "."
        if part[:-1] not in _HOLDERS or not _all(rest, part):
            return ""
        prefix, rest = prefix + part, [name.removeprefix(part) for name in rest]
    return ""


def _all(names: Iterable[str], prefix: str) -> bool:
    """Return whether every name begins with `prefix`, and is more than that."""
    return all(name.startswith(prefix) and len(name) > len(prefix) for name in names)


def _places(names: Iterable[str]) -> set[str]:
    """Return the paths before the first number: `model.layers` of `model.layers.0.mlp.up.weight`"""
    found = (re.match(r"(.+?)\.\d+\.", name) for name in names)
    return {match[1] for match in found if match}


def prefix_note(stored: Iterable[tuple[str, str]]) -> list[str]:
    """Return a note about the names that were changed, in a list; [] if none was.

    Args:
        stored: (stored name, name in the model) of every weight whose name a wrapper has changed.
    """
    changed = list(stored)
    if not changed:
        return []
    before, after = changed[0]
    return [
        f"the names of {len(changed):,} tensors have parts that the model's class does not have "
        "(of torch.compile, DDP, PEFT or another wrapper around the model); they are taken off, so "
        f"{before} is written as {after}. The manifest lists both"
    ]


def check_layers(model: Checkpoint) -> None:
    """Raise InputError if the tensors are not called as the layers of config.json's family are.

    transformers would ignore them, and fill the model with random numbers.

    Args:
        model: the source as the model holds it.
    """
    families = _families(model.config)
    if families is None:
        return
    linears = [n for n, (_, t) in model.tensors.items() if _is_matrix(n, t.shape)]
    called = {name.split(".")[-2] for name in linears}
    known = {layer for entry in families for layer in entry["layers"]}
    fitting = called & known
    lacks_most = len(families) == 1 and 2 * len(fitting) <= len(called) and (
        2 * len(fitting) <= len(known)
    )  # fmt: skip
    if len(called) < _FEWEST_LAYERS or not known or (fitting and not lacks_most):
        return
    strange = next(name for name in linears if name.split(".")[-2] not in known)
    raise InputError(
        f"{model.root}: config.json says model_type {model.config['model_type']!r}, whose linear "
        f"layers are called {', '.join(sorted(known)[:8])}, but the tensors are called "
        f"{', '.join(sorted(called - known)[:8])} (such as {strange!r}): a loader would leave the "
        "model without them. Take the config.json that belongs to these tensors, or convert them "
        "to the layout of transformers first"
    )


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is the matrix of a module in a numbered layer."""
    return len(shape) == 2 and name.endswith(".weight") and bool(re.search(r"\.\d+\.", name))
