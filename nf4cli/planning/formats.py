"""Give each module the format that a recipe asks for: its blocksize, nested scales or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from ..errors import UsageError
from ..format.config import ModuleFormat, QuantConfig
from .selection import matches

Formats = Callable[[str], QuantConfig]
"""Gives the recipe of one module, by its path."""


class _Patterns:
    """The patterns of a recipe's formats.

    A recipe may have thousands without a wildcard. They are looked up, not tried one by one.
    """

    def __init__(self, formats: Collection[ModuleFormat]) -> None:
        self.format_of: dict[str, ModuleFormat] = {}
        for each in formats:
            for pattern in each.modules:
                if pattern in self.format_of:
                    raise UsageError(f"the recipe has {pattern!r} twice: leave it in one list")
                self.format_of[pattern] = each
        self._globs = [pattern for pattern in self.format_of if any(c in pattern for c in "*?[")]

    def naming(self, path: str) -> Iterator[str]:
        """Yield the patterns that name a module, see `selection.matches`."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            for start in range(end):
                run = ".".join(parts[start:end])
                if run in self.format_of:
                    yield run
        yield from (pattern for pattern in self._globs if matches(pattern, path))


def formats_of(config: QuantConfig) -> Formats:
    """Return what gives the recipe of a module: the whole one with the module's own format in it.

    Raises:
        UsageError: a pattern is in two lists.
    """
    patterns = _Patterns(config.formats)
    recipes = {
        each: replace(config, blocksize=each.blocksize, double_quant=each.double_quant)
        for each in config.formats
    }

    def recipe_of(path: str) -> QuantConfig:
        pattern = next(patterns.naming(path), None)
        return config if pattern is None else recipes[patterns.format_of[pattern]]

    return recipe_of


def require_formats(config: QuantConfig, packed: Collection[str], kept: Collection[str]) -> None:
    """Raise UsageError if a pattern of the formats names no packed module, or two name the same.

    Args:
        packed, kept: paths of the modules that become 4-bit, and of those that do not.
    """
    patterns = _Patterns(config.formats)
    used: set[str] = set()
    for path in packed:
        found = list(patterns.naming(path))
        used.update(found)
        if len({patterns.format_of[pattern] for pattern in found}) > 1:
            raise UsageError(
                f"the recipe gives {path} several formats, by {' and '.join(map(repr, found))}: "
                "leave it in one list"
            )
    unknown = [pattern for pattern in patterns.format_of if pattern not in used]
    if not unknown:
        return
    if any(matches(unknown[0], path) for path in kept):
        raise UsageError(
            f"the recipe gives {unknown[0]!r} a 4-bit format, but nf4 keeps it in full precision "
            "(nf4 quantize --plan says why): take it out of the list"
        )
    raise UsageError(
        f"the recipe names {unknown[0]!r}, which is no module of this model; its 4-bit modules "
        f"are called like {', '.join(sorted(packed)[:3])}"
    )


def formats_like(
    packings: Mapping[str, tuple[int, bool]],
) -> tuple[tuple[int, bool], tuple[ModuleFormat, ...]]:
    """Return the commonest (blocksize, double_quant) of packed modules, and formats of the others.

    Args:
        packings: (blocksize, double_quant) by path, at least one.
    """
    groups: dict[tuple[int, bool], list[str]] = {}
    for path, packing in packings.items():
        groups.setdefault(packing, []).append(path)
    common = max(groups, key=lambda packing: (len(groups[packing]), packing))
    others = sorted(groups.keys() - {common})
    return common, tuple(ModuleFormat(*each, tuple(sorted(groups[each]))) for each in others)
