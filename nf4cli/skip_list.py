"""llm_int8_skip_modules: the list that tells every loader what is not packed.

transformers 4, transformers 5 and vLLM match its entries against module paths in three ways
(those of transformers 4.55 to 5.23 were run, vLLM's was read).  A list that is right
under all three names kept modules by their full paths, and has no entry that any of them would take
for a packed one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

VETTED_HEADS = (
    "lm_head", "embed_out", "proj_out", "vocab_projector", "cls.predictions.decoder",
    "predictions.decoder", "lm_head.decoder", "decoder", "score", "classifier", "qa_outputs",
    "output_projection", "pred_layer.proj", "lm_loss", "pooler.dense",
)  # fmt: skip
"""Heads that may be absent from the files (tied, or of another class of the same family) and must
be in the list all the same: a list in the config replaces the loaders' own defaults."""


def hits(key: str, module: str) -> bool:
    """Whether any loader's matcher takes `key` in a skip list to mean `module`."""
    return hits_v5(key, module) or hits_v4(key, module) or hits_vllm(key, module)


def hits_v5(key: str, module: str) -> bool:
    """transformers 5: a regex from the start up to a part's boundary, or a bare suffix."""
    if module.endswith(key):
        return True
    try:
        return bool(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module))
    except (re.error, OverflowError, RecursionError):
        return False  # transformers itself would raise on such a key


def hits_v4(key: str, module: str) -> bool:
    """transformers 4: the last part, the full path, or `key.` anywhere in the path."""
    return module.rpartition(".")[2] == key or module == key or f"{key}." in module


def hits_vllm(key: str, module: str) -> bool:
    """vLLM: one of the dotted parts, or a dotted prefix."""
    return key in module.split(".") or module == key or module.startswith(key + ".")


def path_forms(module: str, base_prefix: str) -> tuple[str, ...]:
    """A module's path as the headed and the bare model call it.

    Args:
        base_prefix: the attribute of the headed model that holds the bare one, "" for none.
    """
    if not base_prefix:
        return (module,)
    prefix = base_prefix + "."
    if module.startswith(prefix):
        return (module, module.removeprefix(prefix))
    return (module, prefix + module)


def means(key: str, module: str, base_prefix: str) -> bool:
    """Whether a skip list's `key` means `module` under either of its names, in transformers."""
    forms = path_forms(module, base_prefix)
    return any(hits_v5(key, form) or hits_v4(key, form) for form in forms)


_DIGIT = re.compile(r"\d", re.ASCII)


def skip_modules(kept: Iterable[str], quantized: Iterable[str], base_prefix: str) -> list[str]:
    """llm_int8_skip_modules that every loader reads as: keep these, quantize those.

    A key that any matcher would take for a quantized module is left out, so no weight that is
    packed is ever loaded as a float.

    Args:
        kept: module paths of the matrices that stay in full precision.
        quantized: module paths of the packed weights.
        base_prefix: see `path_forms`.
    """
    # Layers and experts differ in digits only: what misses every masked path misses every path.
    packed: dict[str, list[str]] = {}
    for module in quantized:
        for form in path_forms(module, base_prefix):
            packed.setdefault(_masked(form), []).append(form)
    wanted = dict.fromkeys(VETTED_HEADS)
    for module in kept:
        wanted |= dict.fromkeys(path_forms(_without_expert(module), base_prefix))
    return [
        key
        for key in wanted
        if not any(
            hits(_masked(key), masked) and any(hits(key, form) for form in forms)
            for masked, forms in packed.items()
        )
    ]


def _without_expert(module: str) -> str:
    """`mlp.experts.7.up_proj` -> `mlp.experts`: one entry for all experts of a layer."""
    path, experts, _ = module.partition(".experts.")
    return path + experts.rstrip(".")


def _masked(path: str) -> str:
    return _DIGIT.sub("0", path)


def unmeant(kept: Iterable[str], keys: Collection[str], base_prefix: str) -> Iterator[str]:
    """The kept modules that some version of transformers finds no entry for."""
    here = set(keys)
    for module in kept:
        forms = path_forms(_without_expert(module), base_prefix)
        if here.isdisjoint(forms) and not all(
            any(matches(key, form) for key in keys for form in forms)
            for matches in (hits_v4, hits_v5)
        ):
            yield module


def entangled(module: str, quantized: Iterable[str], base_prefix: str) -> list[str]:
    """The packed modules that an entry for `module` would be taken to mean."""
    keys = path_forms(_without_expert(module), base_prefix)
    return [
        other
        for other in quantized
        if any(hits(key, form) for key in keys for form in path_forms(other, base_prefix))
    ]
