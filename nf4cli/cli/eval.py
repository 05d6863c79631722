"""nf4 eval: how far an output is from its source, as a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import completion, engine_choice, options, panels
from .options import EngineOption, JsonOption, MemoryOption, QuietOption, WorkersOption
from .show import terminal
from .show.listener import TerminalListener
from .show.progress import ProgressDisplay

if TYPE_CHECKING:
    from rich.console import Console

    from ..quality.evaluation.statistics import Figure

_KINDS = {"causal": "language model", "encoder": "encoder"}


def eval_(
    output: Annotated[
        Path,
        typer.Argument(help="A 4-bit checkpoint or any other model, here or org/name on the Hub"),
    ],
    source: Annotated[
        Path, typer.Option("--source", metavar="PATH", help="The model it was made from")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="PATH",
            show_default=False,
            help="Text to measure on; repeatable. Default: two built-in texts",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="At most, of each text")
    ] = 8192,
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens per window")] = 512,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="What both models compute in",
            rich_help_panel=panels.RUNNING,
            autocompletion=completion.dtypes,
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            show_default=False,
            help="cpu or cuda. Default: a GPU if any",
            rich_help_panel=panels.RUNNING,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="PATH",
            show_default=False,
            help="Where the source's results are kept",
            rich_help_panel=panels.CACHE,
        ),
    ] = None,
    cache_size: Annotated[
        str,
        typer.Option(
            "--cache-size",
            metavar="SIZE",
            help="How large that may become",
            rich_help_panel=panels.CACHE,
        ),
    ] = "4GB",
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="X",
            show_default=False,
            help="Largest mean KL divergence of a text",
            rich_help_panel=panels.LIMITS,
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            metavar="X",
            show_default=False,
            help="Smallest share of equal most likely tokens",
            rich_help_panel=panels.LIMITS,
        ),
    ] = None,
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity, KL divergence, agreement with the source (extra: eval)."""
    from ..api import sources
    from ..quality.calibration.text import torch_device
    from ..quality.evaluation.cache import default_directory
    from ..quality.evaluation.decoded import decoded
    from ..quality.evaluation.models import kind_of, libraries, require_device

    if not 8 <= context <= tokens:
        raise UsageError(f"--context {context:,} is below 8, or above --tokens {tokens:,}")
    libraries()
    names = output, source
    listener = TerminalListener(quiet)
    output, source = sources.local(output, listener), sources.local(source, listener)
    asked = Evaluating(
        texts=_texts(text), tokens=tokens, context=context, dtype=dtype,
        device=device or torch_device(None), place=cache_dir or default_directory(),
        cache_size=options.parse_size(cache_size, "--cache-size"), shows=not quiet,
    )  # fmt: skip
    require_device(asked.device)
    kind = kind_of(source)
    machine = engine_choice.machine(engine, None, workers, memory, listener)
    chosen, limits = machine.engine, machine.resources()
    with (
        decoded(source, asked.place, chosen, limits) as original,
        decoded(output, asked.place, chosen, limits) as ordinary,
    ):
        measure = asked.causal if kind == "causal" else asked.encoder
        results = measure(Named(source, original), Named(output, ordinary))
    failures = list(_failures(results, max_kl, min_top1))
    if json:
        document = {
            "path": str(output), "source": str(source), "kind": kind, "context": context,
            "texts": {
                name: {"positions": count, **{n: f.as_list() for n, f in found.items()}}
                for name, (count, found) in results.items()
            },
            "failures": failures, "ok": not failures,
        }  # fmt: skip
        terminal.print_json("eval", document)
    elif not quiet or failures:
        against = " against ".join(map(sources.shown, names, (output, source)))
        _print(terminal.out_console(), against, kind, results, failures)
    raise typer.Exit(1 if failures else 0)


Results = dict[str, "tuple[int, dict[str, Figure]]"]
"""By text: positions or pieces measured, and the figures."""


@dataclass(frozen=True)
class Named:
    """Attributes:
    path: as it was given.
    ordinary: with its weights decoded.
    """

    path: Path
    ordinary: Path


class Evaluating:
    """What is asked of an evaluation.

    Args:
        texts: path by name.
    """

    def __init__(
        self, texts: dict[str, Path], tokens: int, context: int, dtype: str, device: str,
        place: Path, cache_size: int, shows: bool,
    ) -> None:  # fmt: skip
        self.texts, self.tokens, self.context = texts, tokens, context
        self.dtype, self.device, self.place = dtype, device, place
        self.cache_size, self.shows = cache_size, shows

    def causal(self, source: Named, output: Named) -> Results:
        """A language model; the source is run over all texts before the output is."""
        from ..quality.calibration.text import open_tokenizer
        from ..quality.evaluation.cache import Cache
        from ..quality.evaluation.causal import Source, vocabulary_of
        from ..quality.texts import read_documents, sequences

        tokenizer = open_tokenizer(source.path)
        cache = Cache(self.place, self.cache_size)
        room = cache.windows(self.context, vocabulary_of(source.path)) // len(self.texts)
        count = self.tokens // self.context
        if room < 1:
            raise UsageError(
                f"--cache-size leaves no window for each of {len(self.texts)} texts: make it larger"
            )
        if room < count and self.shows:
            terminal.note(
                f"--cache-size leaves room for {room * self.context:,} of {self.tokens:,} tokens "
                "of each text"
            )
        windows = {
            name: sequences(read_documents([path]), tokenizer, self.context, min(count, room))
            for name, path in self.texts.items()
        }
        total = 2 * sum(map(len, windows.values()))
        results: Results = {}
        with self._display(total, source, output) as progress:
            said = {
                name: Source(
                    source.ordinary, source.path, found, cache, self.dtype, self.device, progress
                )
                for name, found in windows.items()
            }
            for name, one in said.items():
                results[name] = (
                    one.tokens.size - len(one.tokens),
                    one.compare(output.ordinary, progress),
                )
        return results

    def encoder(self, source: Named, output: Named) -> Results:
        """A model of embeddings."""
        from ..quality.calibration.text import open_tokenizer
        from ..quality.evaluation.embeddings import compare, embed, pieces
        from ..quality.texts import read_documents

        tokenizer = open_tokenizer(source.path)
        count = max(1, self.tokens // 64)
        texts = {n: pieces(read_documents([p]), count) for n, p in self.texts.items()}
        everything = [piece for found in texts.values() for piece in found]
        with self._display(2 * len(everything), source, output) as progress:
            a, b = (
                embed(model, everything, tokenizer, self.context, self.dtype, self.device, progress)
                for model in (source.ordinary, output.ordinary)
            )
        results: Results = {}
        start = 0
        for name, found in texts.items():
            stop = start + len(found)
            results[name] = len(found), compare(a[start:stop], b[start:stop])
            start = stop
        return results

    @contextmanager
    def _display(self, steps: int, source: Named, output: Named) -> Iterator[Any]:
        """Steps as bytes of weights, which is what a display counts."""
        from ..checkpoint.discovery import open_checkpoint

        nbytes = sum(shard.size for shard in open_checkpoint(source.path).shards)
        what = f"{output.path} against {source.path}"
        with ProgressDisplay(nbytes * steps, "evaluating", self.shows, what=what) as display:
            yield lambda name, count: display(name, nbytes * count)


def _texts(asked: list[Path] | None) -> dict[str, Path]:
    """Path by name, which is the path's own where two files share one."""
    from ..quality import evaluation

    if not asked:
        place = Path(evaluation.__file__).parent / "texts"
        return {"python": place / "python.txt", "packages": place / "packages.txt"}
    stems = [path.stem for path in asked]
    return {
        stem if stems.count(stem) == 1 else str(path): path
        for stem, path in zip(stems, asked, strict=True)
    }


def _failures(results: Results, max_kl: float | None, min_top1: float | None) -> Iterator[str]:
    for name, (_, found) in results.items():
        for option, figure, limit, sign in (
            ("--max-kl", "kl_mean", max_kl, 1),
            ("--min-top1", "top1", min_top1, -1),
        ):
            if limit is None:
                continue
            if figure not in found:
                raise UsageError(f"{option} is for language models, and this is an encoder")
            if sign * found[figure].value > sign * limit:
                yield f"{name}: {figure} is {found[figure].value:.4g}, {option} is {limit:g}"


_ROWS = {
    "causal": (
        ("perplexity, source", "perplexity_source", "{:.2f}"),
        ("perplexity, output", "perplexity_output", "{:.2f}"),
        ("their ratio", "perplexity_ratio", "{:.4f}"),
        ("KL divergence, mean", "kl_mean", "{:.4f}"),
        ("  median", "kl_median", "{:.4f}"),
        ("  95%", "kl_95", "{:.3f}"),
        ("  99%", "kl_99", "{:.3f}"),
        ("  99.9%", "kl_999", "{:.3f}"),
        ("  largest", "kl_max", "{:.3f}"),
        ("same most likely token", "top1", "{:.2%}"),
    ),
    "encoder": (
        ("cosine, mean", "cosine_mean", "{:.5f}"),
        ("  5%", "cosine_5", "{:.5f}"),
        ("  1%", "cosine_1", "{:.5f}"),
        ("  smallest", "cosine_min", "{:.5f}"),
    ),
}


def _print(
    console: Console, against: str, kind: str, results: Results, failures: list[str]
) -> None:
    from rich.table import Table

    console.print(
        f"[bold]{terminal.plain(against)}[/], a {_KINDS[kind]}; in brackets: 95% confidence"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    unit = "positions" if kind == "causal" else "pieces"
    for name, (count, _) in results.items():
        table.add_column(f"{terminal.plain(name)}, {count:,} {unit}", justify="right")
    for label, figure, shape in _ROWS[kind]:
        cells = []
        for _, found in results.values():
            value, low, high = (shape.format(x) for x in found[figure].as_list())
            cells.append(f"{value} \\[{low}, {high}]")
        table.add_row(label, *cells)
    console.print(table)
    for failure in failures:
        console.print(f"[red]wrong[/]   {terminal.plain(failure)}")
