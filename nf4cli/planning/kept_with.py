"""What else has to be kept because of what is kept, so that every loader can tell the two apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import UsageError
from . import model_config, selection, skip_list

FOLLOWING = (selection.ENTANGLED.name, selection.FUSED_WITH.name)
"""The rules that keep something because something else is kept."""


def skip_modules(
    choices: dict[str, selection.Choice], names: skip_list.Names, target: str
) -> list[str]:
    """The skip list; a module that no list can tell from a kept one is kept as well.

    Args:
        choices: by tensor name; what has to be kept in addition is changed in place.

    Raises:
        UsageError: the user keeps a module that cannot be told from packed ones.
    """
    while True:
        kept = selection.kept_modules(choices)
        packed = {selection.module_path(n): n for n, c in choices.items() if c.quantize}
        if target == "vllm" and (partners := _vllm_partners(kept, packed)):
            for module in partners:
                choices[packed[module]] = selection.Choice(False, selection.FUSED_WITH)
            continue
        entries = skip_list.collapse(kept, packed)
        fused = model_config.vllm_fused_modules(kept, packed) if target == "vllm" else []
        skip = skip_list.skip_modules([*entries, *fused], packed, names)
        lost = next(skip_list.unmeant(entries, skip, names), None)
        if lost is None:
            return skip
        if kept[entries[lost]].rule is selection.USER:
            raise UsageError(
                f"--keep cannot leave {lost} alone in full precision: loaders would take its "
                "name to mean packed modules as well. Keep those too, or none"
            )
        for module in skip_list.entangled(lost, packed, names):
            choices[packed[module]] = selection.Choice(False, selection.ENTANGLED)


def _vllm_partners(kept: Mapping[str, selection.Choice], packed: Collection[str]) -> set[str]:
    """What has to be kept because a module that holds a NaN is (others are the user's to name)."""
    return {
        partner
        for module, choice in kept.items()
        if choice.rule in (selection.NONFINITE, selection.FUSED_WITH)
        for partner in model_config.vllm_partners(module, packed)
    }
