"""Write llm_int8_skip_modules: the list that tells every loader which modules are not packed.

transformers 4, transformers 5 and vLLM match its entries against module paths in three ways
(transformers 4.55 to 5.23 were run to learn theirs, vLLM's code was read).  A list that is right
under all three names kept modules by their full paths.  It has no entry that any of the three would
match with a packed module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import InputError

VETTED_HEADS = (
    "lm_head", "embed_out", "proj_out", "vocab_projector", "cls.predictions.decoder",
    "predictions.decoder", "lm_head.decoder", "decoder", "score", "classifier", "qa_outputs",
    "output_projection", "pred_layer.proj", "lm_loss", "pooler.dense",
)  # fmt: skip
"""Heads that must be in the list even where the files have none of that name (it is tied, or of
another class of the same family): a list in the config replaces the loaders' own defaults."""


_MOST_PAIRS = 5_000_000
"""Most pairs of a kept name and a kind of packed module: each takes microseconds to compare.  The
largest mixtures have some 100,000."""
_MAY_RUN_FOR_EVER = re.compile(r"\(.*[*+?{]|[*+?{].*[*+?{].*[*+?{]", re.DOTALL)
"""A quantifier inside a group, or three quantifiers: such a regular expression may take time that
is exponential, or a high power, in the length of a name.  Paths of modules have no quantifier,
patterns in use have one or two."""


def hits(key: str, module: str) -> bool:
    """Return whether any loader matches `key` in a skip list with `module`."""
    return hits_v5(key, module) or hits_v4(key, module) or hits_vllm(key, module)


def hits_v5(key: str, module: str) -> bool:
    """Return whether transformers 5 matches `key` with `module`: as a suffix, or as a regular
    expression from the start of the path to the end of a part.

    Raises:
        InputError: as a regular expression, `key` may take for ever.
    """
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
    """Return whether transformers 4 matches `key` with `module`: as its last part, as its full
    path, or with `key.` anywhere in the path."""
    return module.rpartition(".")[2] == key or module == key or f"{key}." in module


def hits_vllm(key: str, module: str) -> bool:
    """Return whether vLLM matches `key` with `module`: as one of its parts, or as its start."""
    return key in module.split(".") or module == key or module.startswith(key + ".")


@dataclass(frozen=True, slots=True)
class Names:
    """The paths under which loaders may know the modules of a checkpoint.

    Attributes:
        base_prefix: the attribute of a headed model that holds the bare one, "" for none: a
            checkpoint of either loads into either.
        renamings: (path in the checkpoint, path in the model) of whole leading parts that some
            version of transformers renames while loading; `*` stands for a number.
        modules: path in the checkpoint -> paths in the model, for single modules, as transformers
            answered.
    """

    base_prefix: str = ""
    renamings: tuple[tuple[str, str], ...] = ()
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def forms(self, module: str) -> tuple[str, ...]:
        """Return every path that a loader may have for a module, its own first."""
        paths = dict.fromkeys(self._with_and_without_base(module))
        for form in tuple(paths):
            for source, target in self.renamings:
                renamed = _rename(form, source, target)
                if renamed is not None:
                    paths |= dict.fromkeys(self._with_and_without_base(renamed))
        for path in self.modules.get(module, ()):
            paths |= dict.fromkeys(self._with_and_without_base(path))
        return tuple(paths)

    def _with_and_without_base(self, module: str) -> tuple[str, str]:
        prefix = self.base_prefix + "." if self.base_prefix else ""
        if module.startswith(prefix):
            return module, module.removeprefix(prefix)
        return module, prefix + module


def _rename(path: str, source: str, target: str) -> str | None:
    """Return `path` with `target` for `source`, its first parts; None where it starts otherwise."""
    parts, leading = path.split("."), source.split(".") if source else []
    if len(parts) < len(leading):
        return None
    numbers = []
    for part, expected in zip(parts, leading, strict=False):
        if expected == "*" and part.isdecimal():
            numbers.append(part)
        elif part != expected:
            return None
    places = iter(numbers)
    renamed = [next(places, "*") if part == "*" else part for part in target.split(".") if part]
    return ".".join([*renamed, *parts[len(leading) :]])


def means(key: str, module: str, names: Names) -> bool:
    """Return whether transformers matches a skip list's `key` with any name of `module`."""
    return any(hits_v5(key, form) or hits_v4(key, form) for form in names.forms(module))


def collapse(kept: Iterable[str], quantized: Iterable[str]) -> dict[str, str]:
    """Return entry of the skip list -> a kept module that it stands for.

    The entry is the module itself, or `mlp.experts` where all experts of a layer are kept.
    """
    mixed = {_without_expert(module) for module in quantized}
    entries = {}
    for module in kept:
        experts = _without_expert(module)
        entries[module if experts in mixed else experts] = module
    return entries


def skip_modules(kept: Iterable[str], quantized: Iterable[str], names: Names) -> list[str]:
    """Return the llm_int8_skip_modules under which every loader keeps `kept` and packs `quantized`.

    A key that any loader would match with a packed module is left out, so that no packed weight is
    ever loaded as a float.

    Args:
        kept: paths of the matrices that stay in full precision, see `collapse`.
        quantized: paths of the packed modules.

    Raises:
        InputError: there are so many that comparing them would take minutes; see `hits_v5`.
    """
    # Layers and experts differ in digits only: what misses every masked path misses every path.
    packed: dict[str, list[str]] = {}
    for module in quantized:
        for form in names.forms(module):
            packed.setdefault(_masked(form), []).append(form)
    keys = dict.fromkeys(VETTED_HEADS)
    for module in kept:
        keys |= dict.fromkeys(names.forms(module))
    if len(keys) * len(packed) > _MOST_PAIRS:
        raise InputError(
            f"{len(keys):,} names of kept modules would have to be told from {len(packed):,} "
            "kinds of packed ones: no model has that many that differ in more than numbers"
        )
    return [
        key
        for key in keys
        if not any(
            hits(_masked(key), masked) and any(hits(key, form) for form in forms)
            for masked, forms in packed.items()
        )
    ]


def mistaken(
    keys: Collection[str], packed: Iterable[str], matches: Callable[[str, str], bool]
) -> Iterator[tuple[str, str]]:
    """Yield each packed module that a loader matches with an entry, with the first such entry.

    Entries and modules are told apart by kinds first, as in `skip_modules`: the largest mixtures
    have 100,000 packed modules of a dozen kinds.

    Args:
        keys: the skip list.
        packed: paths of modules.
        matches: `hits`, or one loader's way to match.

    Raises:
        InputError: see `hits_v5`.
    """
    kinds: dict[str, list[tuple[int, str]]] = {}
    for entry in enumerate(keys):
        # A digit in a regular expression may count, so it is compared with every module.
        kind = _masked(entry[1]) if _PLAIN.fullmatch(entry[1]) else ""
        kinds.setdefault(kind, []).append(entry)
    near: dict[str, list[str]] = {}
    for module in packed:
        masked = _masked(module)
        if masked not in near:
            found = (kind for kind in kinds if not kind or matches(kind, masked))
            near[masked] = [key for _, key in sorted(e for kind in found for e in kinds[kind])]
        key = next((key for key in near[masked] if matches(key, module)), None)
        if key is not None:
            yield module, key


def unmeant(kept: Iterable[str], keys: Collection[str], names: Names) -> Iterator[str]:
    """Yield the kept modules that some version of transformers matches with no entry.

    Args:
        keys: the skip list.
    """
    entries = set(keys)
    for module in kept:
        for form in names.forms(module):
            if form not in entries and not all(
                any(matches(key, form) for key in keys) for matches in (hits_v4, hits_v5)
            ):
                yield module
                break


def unmatched(paths: Iterable[str], keys: Collection[str]) -> list[str]:
    """Return the keys that have to be added to a skip list so that it names modules of the model.

    Args:
        paths: of the modules in the model; `LIST.*` for all of a list.
        keys: the skip list.
    """
    return [
        path.removesuffix(".*")
        for path in paths
        if not all(
            any(matches(key, path.replace("*", "1")) for key in keys)
            for matches in (hits_v4, hits_v5)
        )
    ]


def entangled(module: str, quantized: Iterable[str], names: Names) -> list[str]:
    """Return the packed modules that a loader would match with an entry for `module`."""
    keys = names.forms(module)
    return [
        other
        for other in quantized
        if any(hits(key, form) for key in keys for form in names.forms(other))
    ]


_PLAIN = re.compile(r"[\w.-]+")
_DIGIT = re.compile(r"\d", re.ASCII)


def _masked(path: str) -> str:
    """Return a path with every digit as 0."""
    return _DIGIT.sub("0", path)


def _without_expert(module: str) -> str:
    """Return `mlp.experts` of `mlp.experts.3.up_proj`; another path as it is."""
    path, experts, _ = module.partition(".experts.")
    return path + experts.rstrip(".")
