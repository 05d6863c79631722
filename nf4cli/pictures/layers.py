"""Sort weights by layer and kind of module, so that a page shows 20,000 of them at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Value = TypeVar("Value")

_MOST_CELLS = 3000  # of a heat map, about 300 bytes each
_MOST_KINDS, _MOST_PLACES = 40, 4


def split_name(name: str) -> tuple[str, int | None, str]:
    """Return (what is before the layers, layer, kind of module) of a weight's name.

    `model.layers.3.mlp.experts.7.up_proj.weight` is ("model.layers", 3, "mlp.experts.*.up_proj"):
    further numbers become `*`.  A name without a number has layer None, and is a kind by itself.
    """
    parts = name.removesuffix(".weight").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 7), None)
    if first is None or first + 1 == len(parts):
        return "", None, ".".join(parts)
    kind = ("*" if part.isdecimal() else part for part in parts[first + 1 :])
    return ".".join(parts[:first]), int(parts[first]), ".".join(kind)


@dataclass(frozen=True, slots=True)
class Grid(Generic[Value]):
    """Values of weights in layers.

    Attributes:
        place: the path of the layers.
        layers: a label for each row: a layer, or a range of layers where they are very many.
        kinds: of modules, the columns.
        cells: (row, column) -> the values of all weights of these layers and this kind.
        hidden: weights in layers that no cell of a page shows; of the last grid, those of further
            places as well.
    """

    place: str
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int, int], list[Value]]
    hidden: int = 0


def grids(values: Mapping[str, Value]) -> list[Grid[Value]]:
    """Return the values by layer and kind: a grid for each place of layers, the largest first.

    Weights outside of numbered layers are in none.  All grids together have at most 3,000 cells;
    the kinds with the most weights are kept, and neighbouring layers share a row where needed.
    """
    places: dict[str, list[tuple[int, str, Value]]] = {}
    for name, value in values.items():
        place, layer, kind = split_name(name)
        if layer is not None:
            places.setdefault(place, []).append((layer, kind, value))
    order = sorted(places.items(), key=lambda item: -len(item[1]))
    shown, others = order[:_MOST_PLACES], order[_MOST_PLACES:]
    made = [_grid(place, found, _MOST_CELLS // len(shown)) for place, found in shown]
    if others:
        further = sum(len(found) for _, found in others)
        made[-1] = replace(made[-1], hidden=made[-1].hidden + further)
    return made


def _grid(place: str, found: list[tuple[int, str, Value]], most: int) -> Grid[Value]:
    common = {kind for kind, _ in Counter(k for _, k, _ in found).most_common(_MOST_KINDS)}
    kinds = tuple(
        dict.fromkeys(kind for _, kind, _ in sorted(found, key=_by_layer) if kind in common)
    )
    layers = sorted({layer for layer, _, _ in found})
    together = -(-len(layers) // max(1, most // len(kinds)))
    rows = [layers[i : i + together] for i in range(0, len(layers), together)]
    row_of = {layer: i for i, row in enumerate(rows) for layer in row}
    column_of = {kind: i for i, kind in enumerate(kinds)}
    cells: dict[tuple[int, int], list[Value]] = {}
    for layer, kind, value in found:
        if kind in column_of:
            cells.setdefault((row_of[layer], column_of[kind]), []).append(value)
    labels = tuple(str(r[0]) if r[0] == r[-1] else f"{r[0]}-{r[-1]}" for r in rows)
    hidden = len(found) - sum(map(len, cells.values()))
    return Grid(place, labels, kinds, cells, hidden)


def with_hidden(caption: str, grid: Grid[Value]) -> str:
    """Return a caption that says what a grid leaves out."""
    if not grid.hidden:
        return caption
    return f"{caption} {grid.hidden:,} weights of less common kinds are not shown."


def _by_layer(item: tuple[int, str, object]) -> int:
    return item[0]


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Return kind of module -> names of its weights."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(split_name(name)[2], []).append(name)
    return kinds
