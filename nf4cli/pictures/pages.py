"""Make the page of each command from its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from ..output.weight_figures import OUTLIER
from ..units import format_size
from .charts import bars, format_map, heat_map, intervals
from .html import Html, element, page, section, table
from .layers import by_kind, grids, with_hidden

if TYPE_CHECKING:
    from ..api.diffing import Compared
    from ..api.evaluating import Evaluated
    from ..output.manifest import Manifest, TensorError
    from ..output.weight_figures import WeightFigures
    from ..planning.plan import Plan, TensorPlan

_KINDS = 16  # of modules, in bars
_WORST = 30  # weights, in a table


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if value < 0.9995 else f"{100 * value:.0f}"[:5]


def of_quantize(called: str, parts: Mapping[str, tuple[Plan, Manifest]]) -> bytes:
    """Return the page of a conversion.

    Args:
        called: what messages call the output.
        parts: by component; "" is a checkpoint without a pipeline.
    """
    plans = [plan for plan, _ in parts.values()]
    before, after = (
        sum(getattr(plan, size) for plan in plans) for size in ("source_bytes", "shard_bytes")
    )
    facts = [
        ("before", format_size(before)), ("after", f"{format_size(after)} ({after / before:.0%})"),
        ("bits a weight", ", ".join(f"{plan.bits_per_weight:.2f}" for plan in plans)),
    ]  # fmt: skip
    sections: list[Html] = []
    for name, (plan, manifest) in parts.items():
        of = f" in {name}" if name else ""
        errors = {n: t.error for n, t in manifest.tensors.items() if t.error is not None}
        sections += _errors(errors, of)
        written = [t for t in plan.tensors if t.outputs]
        sections += _allocation({t.name: _planned(t) for t in written}, of)
        sections.append(
            _bytes_by_kind(
                {t.name: (t.source_bytes, t.nbytes_out) for t in written}, ("before", "after"), of
            )
        )
    return page(f"nf4 quantize: {called}", facts, sections)


def _planned(tensor: TensorPlan) -> tuple[str, str]:
    """Return how a weight is stored, in five characters and in words."""
    if tensor.state is None:
        dtype = next(iter(tensor.outputs.values()))[0]
        return dtype[:5], dtype
    return tensor.state.short, tensor.state.words


def _errors(errors: Mapping[str, TensorError], of: str) -> Iterator[Html]:
    """Yield sections about the error of rounding, none where it is not known."""
    errors = {name: error for name, error in errors.items() if isfinite(error.rel_rmse)}
    if not errors:
        return
    caption = (
        "Relative RMSE against the source in percent; the mean where a cell has several weights."
    )
    maps = [
        heat_map(f"Error by layer, {grid.place}", with_hidden(caption, grid), grid, _percent, "%")
        for grid in grids({name: error.rel_rmse for name, error in errors.items()})
    ]
    worst = sorted(errors.items(), key=lambda item: -item[1].rel_rmse)[:_WORST]
    rows = [
        (name, _percent(e.rel_rmse), f"{e.max_abs:.3g}", f"{e.outlier_share:.2%}")
        for name, e in worst
    ]
    yield section(f"Error{of}", *maps)
    headings = ("weight", "relative RMSE %", "largest error", "outlier blocks")
    yield section(f"Largest errors{of}", table(f"Of {len(errors):,} weights", headings, rows))


def _allocation(stored: Mapping[str, tuple[str, str]], of: str) -> Iterator[Html]:
    """Yield a section with a map of how each weight is stored: (short, words) by name."""
    matrices = {n: words for n, words in stored.items() if n.endswith(".weight")} or dict(stored)
    caption = "How each weight is stored: blocksize, n for nested scales, or a dtype."
    maps = [
        format_map(f"Format by layer, {g.place}", with_hidden(caption, g), g)
        for g in grids(matrices)
    ]
    if maps:
        yield section(f"Allocation{of}", *maps)


def _bytes_by_kind(
    sizes: Mapping[str, Sequence[int]], series: Sequence[str], of: str
) -> Html:  # fmt: skip
    """Return a section with the bytes of each kind of module, the largest first."""
    sums = {
        kind: [sum(column) for column in zip(*(sizes[name] for name in names), strict=True)]
        for kind, names in by_kind(sizes).items()
    }
    order = sorted(sums.items(), key=lambda item: -max(item[1]))
    rows: list[tuple[str, Sequence[float]]] = list(order[:_KINDS])
    if rest := order[_KINDS:]:
        total = [sum(column) for column in zip(*(v for _, v in rest), strict=True)]
        rows.append((f"{len(rest):,} others", total))
    caption = "Bytes by kind of module, scales included."
    return section(f"Bytes{of}", bars("Bytes by kind", caption, rows, series, format_size))


def of_inspect(
    called: str, parts: Mapping[str, tuple[WeightFigures, Mapping[str, TensorError]]]
) -> bytes:
    """Return the page of a checkpoint: what its weights hold, and errors where they are known."""
    weights = [w for figures, _ in parts.values() for w in figures.weights.values()]
    packed = [w for w in weights if w.blocks]
    facts = [
        ("size", format_size(sum(w.nbytes for w in weights))),
        ("weights", f"{len(weights):,}"), ("in 4 bit", f"{len(packed):,}"),
        ("outlier blocks", f"{sum(w.outliers for w in packed):,}"),
    ]  # fmt: skip
    sections: list[Html] = []
    for name, (figures, errors) in parts.items():
        of = f" in {name}" if name else ""
        sections += _errors(errors, of)
        sections += _allocation({n: (w.short, w.words) for n, w in figures.weights.items()}, of)
        sections += _histograms(figures, of)
        sections += _outliers(figures, of)
        sizes = {n: (w.nbytes,) for n, w in figures.weights.items()}
        sections.append(_bytes_by_kind(sizes, ("bytes",), of))
    return page(f"nf4 inspect: {called}", facts, sections)


def _histograms(figures: WeightFigures, of: str) -> Iterator[Html]:
    for kind, codes in figures.codes.items():
        total = max(1, sum(count for _, count in codes))
        rows = [(f"{value:+.4f}", (count / total,)) for value, count in codes]
        caption = f"Share of each of the 16 values of {kind}, of {total:,} codes."
        chart = bars(f"Codes of {kind}", caption, rows, ("share",), "{:.2%}".format)
        yield section(f"Codes{of}", chart)
    if figures.absmax:
        blocks = [(f"{low:.3g} to {high:.3g}", (n,)) for low, high, n in figures.absmax]
        caption = "Number of blocks by the size of their scale; lengths are logarithmic."
        chart = bars("Absmax", caption, blocks, ("blocks",), "{:,.0f}".format, log=True)
        yield section(f"Scales{of}", chart)


def _outliers(figures: WeightFigures, of: str) -> Iterator[Html]:
    """Yield sections about blocks with a scale far above the others of their weight."""
    packed = {n: w for n, w in figures.weights.items() if w.blocks}
    if not packed:
        return
    caption = (
        f"Blocks whose absmax is above {OUTLIER} times the median of their weight, in percent of "
        "its blocks."
    )
    shares = {n: w.outliers / w.blocks for n, w in packed.items()}
    maps = [
        heat_map(
            f"Outlier blocks by layer, {grid.place}",
            with_hidden(caption, grid),
            grid,
            _percent,
            "%",
        )
        for grid in grids(shares)
    ]
    ratio = {n: w.largest / w.median if w.median else 0.0 for n, w in packed.items()}
    order = sorted(packed.items(), key=lambda item: -ratio[item[0]])[:_WORST]
    rows = [
        (n, f"{ratio[n]:.1f}", f"{w.largest:.4g}", f"{w.block:,}", f"{w.outliers:,}",
         f"{w.broken:,}")
        for n, w in order
    ]  # fmt: skip
    headings = (
        "weight", "largest / median", "largest absmax", "in block", "outlier blocks", "not finite",
    )  # fmt: skip
    data = table("Weights with the largest absmax over their median", headings, rows)
    yield section(f"Outlier blocks{of}", *maps, data)


def of_diff(done: Compared) -> bytes:
    """Return the page of a comparison."""
    found = list(done.parts.values())
    facts = [
        ("A", done.a), ("B", done.b), ("alike", f"{sum(part.same for part in found):,} weights"),
        ("not alike", f"{sum(len(part.tensors) for part in found):,} weights"),
    ]  # fmt: skip
    sections: list[Html] = []
    for name, part in done.parts.items():
        of = f" in {name}" if name else ""
        known = {t.name: t.rel_rmse for t in part.tensors if t.rel_rmse is not None}
        caption = "Root of (sum of squared differences / sum of A's squares), in percent."
        maps = [
            heat_map(f"Difference by layer, {g.place}", with_hidden(caption, g), g, _percent, "%")
            for g in grids(known)
        ]
        if maps:
            sections.append(section(f"Difference{of}", *maps))
        sizes: list[tuple[str, Sequence[float]]] = [("A", (part.bytes_a,)), ("B", (part.bytes_b,))]
        chart = bars("Bytes", "Of all weight files.", sizes, ("bytes",), format_size)
        sections.append(section(f"Bytes{of}", chart))
        order = part.largest_first
        rows = [
            (t.name, t.kind, t.a or "nothing", t.b or "nothing",
             "-" if t.changed is None else f"{t.changed / max(1, t.elements):.2%}",
             "-" if t.codes_changed is None else f"{t.codes_changed / max(1, t.elements):.2%}",
             "-" if t.rel_rmse is None else _percent(t.rel_rmse))
            for t in order[:_WORST]
        ]  # fmt: skip
        headings = ("weight", "what", "A", "B", "changed", "codes", "relative RMSE %")
        caption = f"{len(rows):,} of {len(order):,} weights that differ"
        sections.append(section(f"Weights{of}", table(caption, headings, rows)))
        stored = Counter((t.a, t.b) for t in part.tensors if t.a != t.b).most_common(_WORST)
        if stored:
            pairs = [(f"{a or 'nothing'} | {b or 'nothing'}", f"{n:,}") for (a, b), n in stored]
            sections.append(
                section(f"Formats{of}", table("A | B", ("stored as", "weights"), pairs))
            )
        if part.config:
            keys = [(key, f"{a}"[:80], f"{b}"[:80]) for key, (a, b) in part.config.items()][:100]
            sections.append(section(f"config.json{of}", table("Keys", ("key", "A", "B"), keys)))
    lone = [f"{n}: only in A" for n in done.only_a] + [f"{n}: only in B" for n in done.only_b]
    if lone:
        sections.append(section("Components", *(element("p", text) for text in lone)))
    return page("nf4 diff", facts, sections)


def of_eval(done: Evaluated, rows: Sequence[tuple[str, str, str]]) -> bytes:
    """Return the page of an evaluation.

    Args:
        rows: (label, name of a figure, format) as the command prints them.
    """
    facts = [("models", done.called), ("limits", "kept" if done.ok else "; ".join(done.failures))]
    first = ("kl_mean", "KL divergence, nats") if done.kind == "causal" else (
        "cosine_mean", "cosine")  # fmt: skip
    means = [
        (name, f.value, f.low, f.high)
        for name, measured in done.texts.items()
        for f in (measured.figures[first[0]],)
    ]
    sections = [
        section(
            "By text", intervals("Mean by text", "Mean, with its 95% interval.", means, first[1])
        )
    ]
    for name, measured in done.texts.items():
        if measured.ranges:
            places = [
                (f"{r.first}-{r.last}", r.kl.value, r.kl.low, r.kl.high) for r in measured.ranges
            ]
            caption = "KL divergence by tokens before, mean and 95% interval over windows."
            chart = intervals(f"KL divergence by position, {name}", caption, places, "nats")
            sections.append(section(f"By position: {name}", chart))
        if measured.worst:
            tokens = [(w.before, w.token, f"{w.kl:.3f}", f"{w.window}", f"{w.position}")
                      for w in measured.worst]  # fmt: skip
            headings = ("text before", "token that follows", "KL", "window", "position")
            data = table("Largest KL divergences", headings, tokens)
            sections.append(section(f"Worst tokens: {name}", data))
    figures = [
        (label, *(f"{shape.format(f.value)} [{shape.format(f.low)}, {shape.format(f.high)}]"
                  for f in (m.figures[figure] for m in done.texts.values())))
        for label, figure, shape in rows
    ]  # fmt: skip
    data = table("All figures, with 95% intervals", ("figure", *done.texts), figures)
    return page("nf4 eval", facts, [*sections, section("Figures", data)])
