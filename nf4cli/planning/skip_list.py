"""llm_int8_skip_modules: the list that tells every loader what is not packed.

transformers 4, transformers 5 and vLLM match its entries against module paths in three ways
(those of transformers 4.55 to 5.23 were run, vLLM's was read).  A list that is right
under all three names kept modules by their full paths, and has no entry that any of them would take
for a packed one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import InputError

VETTED_HEADS = (
    "lm_head", "embed_out", "proj_out", "vocab_projector", "cls.predictions.decoder",
    "predictions.decoder", "lm_head.decoder", "decoder", "score", "classifier", "qa_outputs",
    "output_projection", "pred_layer.proj", "lm_loss", "pooler.dense",
)  # fmt: skip
"""Heads that may be absent from the files (tied, or of another class of the same family) and must
be in the list all the same: a list in the config replaces the loaders' own defaults."""


_MOST_PAIRS = 5_000_000
"""Of a name and a kind of packed module, each compared in microseconds; the largest mixtures have
some 100,000."""
_MAY_RUN_FOR_EVER = re.compile(r"\(.*[*+?{]|[*+?{].*[*+?{].*[*+?{]", re.DOTALL)
"""A group with a quantifier, or three of them: matching can take time that is exponential, or a
high power, in the length of a name.  Paths of modules have none, patterns in use one or two."""


def hits(key: str, module: str) -> bool:
    """Whether any loader's matcher takes `key` in a skip list to mean `module`."""
    return hits_v5(key, module) or hits_v4(key, module) or hits_vllm(key, module)


def hits_v5(key: str, module: str) -> bool:
    """transformers 5: a regex from the start up to a part's boundary, or a bare suffix."""
    if module.endswith(key):
        return True
    if module.startswith(key) and module[len(key) : len(key) + 1] in ("", "."):
        return True
    if _MAY_RUN_FOR_EVER.search(key):
        raise InputError(
            f"{key[:200]!r} in a skip list, or as a module's name, is a regular expression that "
            "transformers may never finish: expected the path of a module"
        )
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


@dataclass(frozen=True, slots=True)
class Names:
    """What loaders may call a module that the checkpoint has under one path.

    Attributes:
        base_prefix: the attribute of a headed model that holds the bare one, "" for none: a
            checkpoint of either loads into either.
        renamings: (path in the checkpoint, path in the model) of whole leading parts that some
            version of transformers renames while loading; `*` stands for a number.
        modules: the same for single modules, as transformers answered.
    """

    base_prefix: str = ""
    renamings: tuple[tuple[str, str], ...] = ()
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def forms(self, module: str) -> tuple[str, ...]:
        """Every path a loader may have for it, its own first."""
        found = dict.fromkeys(self._with_and_without_base(module))
        for form in tuple(found):
            for source, target in self.renamings:
                renamed = _rename(form, source, target)
                if renamed is not None:
                    found |= dict.fromkeys(self._with_and_without_base(renamed))
        for there in self.modules.get(module, ()):
            found |= dict.fromkeys(self._with_and_without_base(there))
        return tuple(found)

    def _with_and_without_base(self, module: str) -> tuple[str, str]:
        prefix = self.base_prefix + "." if self.base_prefix else ""
        if module.startswith(prefix):
            return module, module.removeprefix(prefix)
        return module, prefix + module


def _rename(path: str, source: str, target: str) -> str | None:
    """`path` with its leading `source` exchanged for `target`, None where it has another."""
    parts, wanted = path.split("."), source.split(".") if source else []
    if len(parts) < len(wanted):
        return None
    numbers = []
    for part, want in zip(parts, wanted, strict=False):
        if want == "*" and part.isdecimal():
            numbers.append(part)
        elif part != want:
            return None
    places = iter(numbers)
    renamed = [next(places, "*") if part == "*" else part for part in target.split(".") if part]
    return ".".join([*renamed, *parts[len(wanted) :]])


def means(key: str, module: str, names: Names) -> bool:
    """Whether a skip list's `key` means `module` under any of its names, in transformers."""
    return any(hits_v5(key, form) or hits_v4(key, form) for form in names.forms(module))


def collapse(kept: Iterable[str], quantized: Iterable[str]) -> dict[str, str]:
    """Entry -> a kept module it stands for: `mlp.experts` where all experts of a layer stay."""
    mixed = {_without_expert(module) for module in quantized}
    found = {}
    for module in kept:
        experts = _without_expert(module)
        found[module if experts in mixed else experts] = module
    return found


def skip_modules(kept: Iterable[str], quantized: Iterable[str], names: Names) -> list[str]:
    """llm_int8_skip_modules that every loader reads as: keep these, quantize those.

    A key that any matcher would take for a quantized module is left out, so no weight that is
    packed is ever loaded as a float.

    Args:
        kept: paths of the matrices that stay in full precision, see `collapse`.
        quantized: paths of the packed modules.

    Raises:
        InputError: there are so many that it would take minutes.
    """
    # Layers and experts differ in digits only: what misses every masked path misses every path.
    packed: dict[str, list[str]] = {}
    for module in quantized:
        for form in names.forms(module):
            packed.setdefault(_masked(form), []).append(form)
    wanted = dict.fromkeys(VETTED_HEADS)
    for module in kept:
        wanted |= dict.fromkeys(names.forms(module))
    if len(wanted) * len(packed) > _MOST_PAIRS:
        raise InputError(
            f"{len(wanted):,} names of kept modules would have to be told from {len(packed):,} "
            "kinds of packed ones: no model has that many that differ in more than numbers"
        )
    return [
        key
        for key in wanted
        if not any(
            hits(_masked(key), masked) and any(hits(key, form) for form in forms)
            for masked, forms in packed.items()
        )
    ]


def unmeant(kept: Iterable[str], keys: Collection[str], names: Names) -> Iterator[str]:
    """The kept modules that some version of transformers finds no entry for."""
    here = set(keys)
    for module in kept:
        for form in names.forms(module):
            if form not in here and not all(
                any(matches(key, form) for key in keys) for matches in (hits_v4, hits_v5)
            ):
                yield module
                break


def entangled(module: str, quantized: Iterable[str], names: Names) -> list[str]:
    """The packed modules that an entry for `module` would be taken to mean."""
    keys = names.forms(module)
    return [
        other
        for other in quantized
        if any(hits(key, form) for key in keys for form in names.forms(other))
    ]


_DIGIT = re.compile(r"\d", re.ASCII)


def _masked(path: str) -> str:
    return _DIGIT.sub("0", path)


def _without_expert(module: str) -> str:
    path, experts, _ = module.partition(".experts.")
    return path + experts.rstrip(".")
