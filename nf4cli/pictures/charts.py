"""Draw charts as SVG, with Vega-Lite through vl-convert, each with a table that says the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import MachineError
from .html import Html, element, scrolling, shown, table
from .layers import Grid

_STEPS = 8  # colours of a heat map, h0 to h7 of page.css
_FORMATS = 8  # colours of formats, c0 to c7
_CONFIG = {
    "aria": False,  # the figure has a label and a table
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink)", "titleColor": "var(--soft)", "domainColor": "var(--line)",
        "tickColor": "var(--line)", "gridColor": "var(--line)", "labelFontSize": 11,
        "titleFontSize": 11, "titleFontWeight": "normal", "labelLimit": 150,
    },
}  # fmt: skip


def require() -> None:
    """Raise MachineError if the library that draws is not installed."""
    try:
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "--html draws with vl-convert-python: pip install 'nf4cli[pictures]'"
        ) from error


def _svg(spec: dict[str, Any]) -> Html:
    import vl_convert

    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json", "background": None,
        "padding": {"left": 12, "top": 4, "right": 12, "bottom": 4}, "config": _CONFIG, **spec,
    }  # fmt: skip
    text: str = vl_convert.vegalite_to_svg(whole, allowed_base_urls=[])
    return Html(text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def _figure(label: str, caption: str, spec: dict[str, Any], key: Html, data: Html) -> Html:
    picture = element("div", _svg(spec), role="img", aria_label=f"{label}. {caption}")
    return element(
        "figure",
        element("figcaption", caption),
        key,
        scrolling(label, picture),
        element("details", element("summary", f"Table: {label}"), data),
    )


def heat_map(
    label: str, caption: str, grid: Grid[float], form: Callable[[float], str], unit: str = ""
) -> Html:
    """Return a heat map of means, layers downwards, with a table of the means and the largest.

    Args:
        form: how a value is written in a cell, in at most five characters.
        unit: of the values.
    """
    means = {cell: sum(values) / len(values) for cell, values in grid.cells.items()}
    low, high = min(means.values()), max(means.values())
    width = (high - low) / _STEPS
    steps = {
        cell: min(_STEPS - 1, int((mean - low) / width)) if width > 0 else 0
        for cell, mean in means.items()
    }
    colours = {cell: (f"var(--h{n})", f"var(--i{n})") for cell, n in steps.items()}
    texts = {cell: form(mean) for cell, mean in means.items()}
    used = range(_STEPS) if width > 0 else range(1)
    key = element(
        "ul",
        *(element("li", f"{form(low + n * width)} {unit}".strip(), class_=f"h{n}") for n in used),
        class_="key", aria_label="Colours, from the smallest value that has each",
    )  # fmt: skip
    return _figure(
        label, caption, _cells(grid, colours, texts), key,
        _grid_table(label, grid, lambda cell: _mean_and_most(grid.cells[cell], form)),
    )  # fmt: skip


def _mean_and_most(values: list[float], form: Callable[[float], str]) -> str:
    mean = form(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} (largest {form(max(values))})"


def format_map(label: str, caption: str, grid: Grid[tuple[str, str]]) -> Html:
    """Return a map of how weights are stored, layers downwards.

    Args:
        grid: of (short form of at most five characters, words).
    """
    words: dict[str, set[str]] = {}
    for short, long in (value for values in grid.cells.values() for value in values):
        words.setdefault(short, set()).add(long)
    found = {short: " or ".join(sorted(long)) for short, long in words.items()}
    order = sorted(found)
    colour = {short: min(i, _FORMATS - 1) for i, short in enumerate(order)}
    kept = {cell: sorted(set(values))[0][0] for cell, values in grid.cells.items()}
    mixed = {cell: len({v[0] for v in values}) > 1 for cell, values in grid.cells.items()}
    colours = {cell: (f"var(--c{colour[short]})", "var(--ci)") for cell, short in kept.items()}
    texts = {cell: "mixed" if mixed[cell] else short for cell, short in kept.items()}
    key = element(
        "ul", *(element("li", f"{s}: {found[s]}", class_=f"c{colour[s]}") for s in order),
        class_="key", aria_label="Colours",
    )  # fmt: skip
    return _figure(
        label, caption, _cells(grid, colours, texts), key,
        _grid_table(label, grid, lambda cell: ", ".join(sorted({v[0] for v in grid.cells[cell]}))),
    )  # fmt: skip


def _grid_table(label: str, grid: Grid[Any], text: Callable[[tuple[int, int]], str]) -> Html:
    rows = [
        (layer, *(text((i, j)) if (i, j) in grid.cells else "" for j in range(len(grid.kinds))))
        for i, layer in enumerate(grid.layers)
    ]
    return table(label, ("layer", *grid.kinds), rows)


def _cells(
    grid: Grid[Any], colours: dict[tuple[int, int], tuple[str, str]],
    texts: dict[tuple[int, int], str],
) -> dict[str, Any]:  # fmt: skip
    """Return the drawing of coloured cells with texts in them."""
    kinds = [f"{shown(kind)}" for kind in grid.kinds]
    values = [
        {"layer": grid.layers[i], "kind": kinds[j], "fill": fill, "ink": ink, "text": texts[i, j]}
        for (i, j), (fill, ink) in colours.items()
    ]

    def axis(field: str, order: Sequence[str], **more: Any) -> dict[str, Any]:
        return {"field": field, "type": "nominal", "sort": list(order), "axis": {
            "title": None, "ticks": False, "domain": False, **more}}  # fmt: skip

    def raw(field: str) -> dict[str, Any]:
        return {"field": field, "type": "nominal", "scale": None}

    return {
        "data": {"values": values},
        "width": {"step": 38}, "height": {"step": 18},
        "encoding": {
            "x": axis("kind", kinds, orient="top", labelAngle=-60),
            "y": axis("layer", grid.layers, labelOverlap=False),
        },
        "layer": [
            {"mark": "rect", "encoding": {"fill": raw("fill")}},
            {"mark": {"type": "text", "fontSize": 10},
             "encoding": {"text": {"field": "text"}, "fill": raw("ink")}},
        ],
    }  # fmt: skip


def bars(
    label: str, caption: str, rows: Sequence[tuple[str, Sequence[float]]], series: Sequence[str],
    form: Callable[[float], str], log: bool = False,
) -> Html:  # fmt: skip
    """Return horizontal bars, one for each series in a row, with a table.

    Args:
        rows: (name, a value for each series).
        series: one or two names.
        form: how a value is written.
        log: whether lengths are logarithms of (1 + value).
    """
    names = [shown(name) for name, _ in rows]
    values = [
        {"name": name, "series": called, "value": value, "text": form(value)}
        for name, (_, of_row) in zip(names, rows, strict=True)
        for called, value in zip(series, of_row, strict=True)
    ]
    y: dict[str, Any] = {"field": "name", "type": "nominal", "sort": names, "axis": {
        "title": None, "ticks": False, "domain": False, "labelLimit": 120}}  # fmt: skip
    offset = {"yOffset": {"field": "series", "sort": list(series)}} if len(series) > 1 else {}
    colour = {"field": "series", "type": "nominal", "legend": None, "scale": {
        "domain": list(series), "range": ["var(--a)", "var(--b)"][: len(series)]}}  # fmt: skip
    scale = {"scale": {"type": "symlog"}} if log else {}
    spec = {
        "data": {"values": values}, "width": 110,
        "height": {"step": 13, "for": "offset"} if offset else {"step": 17},
        "encoding": {"y": y, **offset, "x": {
            "field": "value", "type": "quantitative", "axis": None, **scale}},
        "layer": [
            {"mark": "bar", "encoding": {"color": colour}},
            {"mark": {"type": "text", "align": "left", "dx": 3, "fontSize": 10,
                      "fill": "var(--ink)"}, "encoding": {"text": {"field": "text"}}},
        ],
    }  # fmt: skip
    if len(series) > 1:
        caption += f" In each row, above: {series[0]}; below: {series[1]}."
    data = table(label, ("name", *series), [(n, *map(form, v)) for n, v in rows])
    return _figure(label, caption, spec, Html(""), data)


def intervals(
    label: str, caption: str, rows: Sequence[tuple[str, float, float, float]], unit: str
) -> Html:
    """Return points with their 95% intervals, over names in their order, with a table.

    Args:
        rows: (name, value, low, high).
    """
    names = [shown(row[0]) for row in rows]
    values = [
        {"name": n, "value": v, "low": low, "high": high}
        for n, (_, v, low, high) in zip(names, rows, strict=True)
    ]
    x = {"type": "quantitative", "axis": {"title": unit, "tickCount": 4, "grid": True},
         "scale": {"zero": False}}  # fmt: skip
    spec = {
        "data": {"values": values}, "width": 190, "height": {"step": 20},
        "encoding": {"y": {"field": "name", "type": "nominal", "sort": names, "axis": {
            "title": None, "ticks": False, "domain": False, "labelLimit": 110}}},
        "layer": [
            {"mark": {"type": "rule", "stroke": "var(--a)", "strokeWidth": 2},
             "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 50, "fill": "var(--a)"},
             "encoding": {"x": {"field": "value", **x}}},
        ],
    }  # fmt: skip
    data = table(label, ("name", unit, "from", "to"), [
        (n, f"{v:.5g}", f"{low:.5g}", f"{high:.5g}") for n, v, low, high in rows])  # fmt: skip
    return _figure(label, caption, spec, Html(""), data)
