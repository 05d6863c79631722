"""Write the skip list of an output, and keep the modules that no skip list could tell from those
that are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import UsageError
from . import selection, skip_list, vllm_rules

FOLLOWING = tuple(
    rule.name for rule in (selection.ENTANGLED, selection.FUSED_WITH, selection.STACKED_WITH)
)
"""Names of the rules that keep a module because another one is kept."""


def skip_modules(
    choices: dict[str, selection.Choice],
    names: skip_list.Names,
    target: str,
    tied: Collection[str] = (),
) -> list[str]:
    """Return the skip list of a selection, and keep what no list can tell from a kept module.

    Args:
        choices: by tensor name.  Those that have to be kept in addition are changed in place.
        names: what loaders call the modules.
        target: the loader, see config.TARGETS.
        tied: paths in the model of tied layers without a weight in the files, see
            `ties.absent_tied`: no packed module may be taken for one of them either.

    Raises:
        UsageError: --keep names a module that cannot be told from packed ones, or a part of what
            vLLM loads as one.
        InputError: see `skip_list.skip_modules`.
    """
    while True:
        kept = selection.kept_modules(choices)
        packed: dict[str, list[str]] = {}
        for name, choice in choices.items():
            if choice.quantize:  # a module of experts has several stacks
                packed.setdefault(selection.module_path(name), []).append(name)
        if target == "vllm" and (partners := vllm_rules.partners_to_keep(kept, packed)):
            _keep(choices, packed, partners, selection.FUSED_WITH)
            continue
        entries = skip_list.collapse(kept, packed)
        fused = vllm_rules.fused_modules(kept, packed) if target == "vllm" else []
        skip = skip_list.skip_modules([*entries, *fused], packed, names)
        ambiguous = next(skip_list.unmeant(entries, skip, names), None)
        if ambiguous is None:
            tied_keys = skip_list.unmatched(tied, skip)
            others = {o for key in tied_keys for o in skip_list.entangled(key, packed, names)}
            if not others:
                return [*skip, *tied_keys]
            _keep(choices, packed, others, selection.ENTANGLED)
            continue
        if kept[entries[ambiguous]].rule is selection.USER:
            raise UsageError(
                f"--keep cannot leave {ambiguous} alone in full precision: loaders would take its "
                "name to mean packed modules as well. Keep those too, or none"
            )
        others = {*skip_list.entangled(ambiguous, packed, names)}
        _keep(choices, packed, others, selection.ENTANGLED)


def _keep(
    choices: dict[str, selection.Choice],
    packed: Mapping[str, Collection[str]],
    modules: Collection[str],
    rule: selection.Rule,
) -> None:
    """Keep the weights of some packed modules.

    Args:
        choices: by tensor name; changed.
        packed: module -> names of its weights.
    """
    for name in (name for module in modules for name in packed[module]):
        choices[name] = selection.Choice(False, rule)
