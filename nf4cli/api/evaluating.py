"""Measure how far an output is from its source, as a model: the work of `nf4cli.evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..callbacks import Progress
from ..checkpoint.discovery import open_checkpoint
from ..convert.listener import Stage
from ..errors import UsageError
from ..quality import evaluation
from ..quality.calibration.text import open_tokenizer, torch_device
from ..quality.evaluation import causal, embeddings
from ..quality.evaluation.cache import Cache, default_directory
from ..quality.evaluation.decoded import decoded
from ..quality.evaluation.models import kind_of, libraries, require_device
from ..quality.evaluation.positions import Range, WorstToken, by_position, worst
from ..quality.evaluation.statistics import Figure
from ..quality.texts import read_documents, sequences
from . import sources
from .machine import Machine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOKENS, CONTEXT, CACHE_BYTES = 8192, 512, 4_000_000_000
"""Defaults: most tokens of each text, tokens of a window, bytes of the source's results."""
_SHORTEST = 8  # tokens of a window
_BEFORE = 8  # tokens shown before one
_TOKENS_PER_PIECE = 64  # of a text for an encoder


@dataclass(frozen=True)
class Evaluation:
    """What to measure, and how.

    Attributes:
        output: a 4-bit checkpoint or any other model; a model of the Hub.
        source: what it was made from.
        other: another output of that source, to compare with; None for none.
        texts: text files and directories; none for two built-in texts.
        tokens: most tokens of each text.
        context: tokens of a window.
        dtype: what both models compute in.
        device: a torch device, None for a GPU where there is one.
        cache_directory: where the source's results are kept, None for the user's cache.
        cache_size: most bytes of them.
        max_kl: largest mean KL divergence of a text that is good, None for no limit.
        min_top1: smallest share of equal most likely tokens that is good, None for no limit.
        machine: decodes what is 4-bit.

    Raises:
        UsageError: the window is too short, or longer than the text may be.
    """

    output: Path
    source: Path
    other: Path | None = None
    texts: Sequence[Path] = ()
    tokens: int = TOKENS
    context: int = CONTEXT
    dtype: str = "auto"
    device: str | None = None
    cache_directory: Path | None = None
    cache_size: int = CACHE_BYTES
    max_kl: float | None = None
    min_top1: float | None = None
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if not _SHORTEST <= self.context <= self.tokens:
            raise UsageError(
                f"--context {self.context:,} is below {_SHORTEST}, or above --tokens "
                f"{self.tokens:,}"
            )

    @property
    def cache_place(self) -> Path:
        """The directory of the source's results, and of decoded weights meanwhile."""
        return self.cache_directory or default_directory()

    @property
    def named_texts(self) -> dict[str, Path]:
        """Each text by its file's name without ending; by its path where two share that name."""
        if not self.texts:
            place = Path(evaluation.__file__).parent / "texts"
            return {"python": place / "python.txt", "packages": place / "packages.txt"}
        stems = [path.stem for path in self.texts]
        return {
            stem if stems.count(stem) == 1 else str(path): path
            for stem, path in zip(stems, self.texts, strict=True)
        }


@dataclass(frozen=True)
class Measured:
    """The figures of one text.

    Attributes:
        positions: that were compared; of an encoder, pieces of text.
        figures: by name, such as kl_mean.
        ranges: the KL divergence by position in a window; () for an encoder.
        worst: the positions with the largest one; () for an encoder.
    """

    positions: int
    figures: Mapping[str, Figure]
    ranges: tuple[Range, ...] = ()
    worst: tuple[WorstToken, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation.

    Attributes:
        path, source: the two models, where they lie on this machine.
        called: what a user reads of them.
        kind: "causal" for a language model, "encoder" for a model of embeddings.
        texts: figures by the text's name.
        failures: a sentence for each limit that is not kept.
        other: the other output; None without one.
    """

    path: Path
    source: Path
    called: str
    kind: str
    texts: Mapping[str, Measured]
    failures: Sequence[str]
    other: Path | None = None

    @property
    def ok(self) -> bool:
        """Return whether every limit is kept."""
        return not self.failures


@dataclass(frozen=True)
class _Model:
    """A model to run.

    Attributes:
        path: its directory as it was given, with the tokenizer.
        ordinary: a directory with its decoded weights.
    """

    path: Path
    ordinary: Path


def compare(asked: Evaluation) -> Evaluated:
    """Run both models over the texts and compare what they predict.

    Raises:
        UsageError, InputError, MachineError: they cannot be compared.
        OSError: the cache cannot be written.
    """
    libraries()
    listener = asked.machine.listener
    given = (asked.source, asked.output, asked.other)
    source, output, *others = (sources.local(p, listener) for p in given if p is not None)
    run = _Run(asked, asked.device or torch_device(None))
    require_device(run.device)
    kind = kind_of(source)
    engine, limits = asked.machine.engine, asked.machine.resources()
    with ExitStack() as stack:
        models = [
            _Model(path, stack.enter_context(decoded(path, asked.cache_place, engine, limits)))
            for path in (source, output, *others)
        ]
        measure = run.causal if kind == "causal" else run.encoder
        texts = measure(*models)
    called = " against ".join(
        (sources.shown(asked.output, output), sources.shown(asked.source, source))
    )
    if asked.other is not None:
        called += f", and beside {sources.shown(asked.other, others[0])}"
    failures = tuple(_failures(texts, asked.max_kl, asked.min_top1))
    return Evaluated(output, source, called, kind, texts, failures, next(iter(others), None))


@dataclass(frozen=True)
class _Run:
    """The comparison of a source with one output, or with two, on a torch device."""

    asked: Evaluation
    device: str

    def causal(self, source: _Model, *outputs: _Model) -> dict[str, Measured]:
        """Return the figures of language models; run the source over all texts first."""
        asked = self.asked
        cache = Cache(asked.cache_place, asked.cache_size)
        tokenizer = open_tokenizer(source.path)
        windows = self._windows(source.path, tokenizer, cache)
        steps = (1 + len(outputs)) * sum(map(len, windows.values()))
        with self._stage(steps, source, outputs) as progress:
            references = {
                name: causal.Source(
                    source.ordinary, source.path, tokens, cache, asked.dtype, self.device, progress
                )
                for name, tokens in windows.items()
            }
            return {
                name: _measured(
                    reference.tokens,
                    [reference.compare(output.ordinary, progress) for output in outputs],
                    tokenizer,
                )
                for name, reference in references.items()
            }

    def _windows(self, source: Path, tokenizer: Any, cache: Cache) -> dict[str, NDArray[np.int64]]:
        """Return int64 [windows, context] of each text, as many as the cache has room for.

        Raises:
            UsageError: the cache has no room for one window of each text.
        """
        asked, texts = self.asked, self.asked.named_texts
        room = cache.windows(asked.context, causal.vocabulary_of(source)) // len(texts)
        count = asked.tokens // asked.context
        if room < 1:
            raise UsageError(
                f"--cache-size leaves no window for each of {len(texts)} texts: make it larger"
            )
        if room < count:
            asked.machine.listener.note(
                f"--cache-size leaves room for {room * asked.context:,} of {asked.tokens:,} tokens "
                "of each text"
            )
        return {
            name: sequences(read_documents([path]), tokenizer, asked.context, min(count, room))
            for name, path in texts.items()
        }

    def encoder(self, source: _Model, *outputs: _Model) -> dict[str, Measured]:
        """Return the figures of models of embeddings."""
        asked = self.asked
        tokenizer = open_tokenizer(source.path)
        count = max(1, asked.tokens // _TOKENS_PER_PIECE)
        pieces = {
            name: embeddings.pieces(read_documents([path]), count)
            for name, path in asked.named_texts.items()
        }
        all_pieces = [piece for of_text in pieces.values() for piece in of_text]
        steps = (1 + len(outputs)) * len(all_pieces)
        with self._stage(steps, source, outputs) as progress:
            embedded = [
                embeddings.embed(
                    model.ordinary, all_pieces, tokenizer, asked.context, asked.dtype, self.device,
                    progress,
                )
                for model in (source, *outputs)
            ]  # fmt: skip
        texts, start = {}, 0
        for name, of_text in pieces.items():
            rows = slice(start, start + len(of_text))
            of_models = (vectors[rows] for vectors in embedded)
            texts[name] = Measured(len(of_text), embeddings.compare(*of_models))
            start = rows.stop
        return texts

    @contextmanager
    def _stage(self, steps: int, source: _Model, outputs: Sequence[_Model]) -> Iterator[Progress]:
        """Report to the listener; a step counts as the bytes of the source's weights."""
        nbytes = sum(shard.size for shard in open_checkpoint(source.path).shards)
        what = " and ".join(str(output.path) for output in outputs)
        stage = Stage("evaluating", nbytes * steps, f"{what} against {source.path}")
        with self.asked.machine.listener.stage(stage) as progress:
            yield lambda name, count: progress(name, nbytes * count)


def _measured(
    tokens: NDArray[np.int64], compared: Sequence[causal.Columns], tokenizer: Any
) -> Measured:
    """Return the figures of a text, with the words at the largest divergences.

    Args:
        tokens: int64 [windows, context].
        compared: of the output, and of the other one if there is one.
        tokenizer: of transformers.
    """
    kl = compared[0]["kl"]
    figures = causal.summarised(*compared)
    named = tuple(
        replace(
            w,
            before=tokenizer.decode(tokens[w.window, max(0, w.position - _BEFORE) : w.position]),
            token=tokenizer.decode(tokens[w.window, w.position : w.position + 1]),
        )
        for w in worst(kl)
    )
    return Measured(tokens.size - len(tokens), figures, by_position(kl), named)


def _failures(
    texts: Mapping[str, Measured], max_kl: float | None, min_top1: float | None
) -> Iterator[str]:
    """Yield a sentence for each limit that a text does not keep.

    Raises:
        UsageError: a limit for language models, and the model is an encoder.
    """
    for name, measured in texts.items():
        for option, figure, limit, sign in (
            ("--max-kl", "kl_mean", max_kl, 1),
            ("--min-top1", "top1", min_top1, -1),
        ):
            if limit is None:
                continue
            if figure not in measured.figures:
                raise UsageError(f"{option} is for language models, and this is an encoder")
            value = measured.figures[figure].value
            if sign * value > sign * limit:
                yield f"{name}: {figure} is {value:.4g}, {option} is {limit:g}"
