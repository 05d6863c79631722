"""Show a run on the terminal: its stages as bars, and each finished weight and file as a line."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ...convert.listener import Listener, Stage
from ...units import format_size
from .progress import ProgressDisplay
from .terminal import err_console, note, plain
from .views import WORDS

if TYPE_CHECKING:
    from ...callbacks import Progress
    from ...output.manifest import Result
    from ...planning.plan import TensorPlan
    from ...planning.resources import Resources


class TerminalListener(Listener):
    """A listener that shows a run on stderr, and counts what it converts.

    Args:
        quiet: show no progress.
        verbose: print a line for every weight and file, and details.
        notes: print notes; None to print them unless `quiet`.

    Attributes:
        quiet, verbose: as given.
        nbytes: bytes of the source that this run converted.
        weights: parameters that this run converted.
        earlier: weight tensors that an earlier run had finished.
    """

    def __init__(
        self, quiet: bool = False, verbose: bool = False, notes: bool | None = None
    ) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._notes = not quiet if notes is None else notes
        self._lock = threading.Lock()
        self._display: ProgressDisplay | None = None
        self.nbytes = self.weights = self.earlier = 0

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Progress]:
        with ProgressDisplay(
            stage.total, stage.label, not self.quiet, what=stage.what, weights=stage.weights,
            transfers=stage.transfers, place=stage.place, crowd=stage.crowd,
        ) as self._display:  # fmt: skip
            yield self._display

    def progress(self, name: str, nbytes: int) -> None:
        if self._display is not None:
            self._display(name, nbytes)

    def note(self, sentence: str) -> None:
        if self._notes:
            note(sentence)

    def detail(self, sentence: str) -> None:
        if self.verbose:
            self._tell(plain(sentence))

    def resumed(self, part: str, plans: Iterable[TensorPlan]) -> None:
        finished = list(plans)
        self.earlier += len(finished)
        if finished and self._display is not None:
            self._display.skip(sum(plan.source_bytes for plan in finished))

    def tensor(self, part: str, plan: TensorPlan, result: Result) -> None:
        with self._lock:
            self.nbytes += plan.source_bytes
            self.weights += plan.numel
        if self.verbose:
            name = f"{part}/{plan.name}" if part else plan.name
            shape = "x".join(map(str, plan.weight.shape)) or "scalar"
            error = f"{result.error.rel_rmse:.4f}" if result.error else "-"
            self._tell(
                f"{WORDS[plan.action]:5}  {shape:>13}  error {error:6}  "
                f"{format_size(plan.nbytes_out):>9}  {plain(name)}"
            )

    def file(self, part: str, name: str, size: int) -> None:
        if self.verbose:
            whole = f"{part}/{name}" if part else name
            self._tell(f"file   {plain(whole)}, {format_size(size)}, is complete")

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # nobody reads stderr: no reason to end the work
            err_console().print(line, soft_wrap=True)


def tell_resources(engine: str, limits: Resources) -> None:
    """Print the engine, threads and memory of a run on stderr."""
    err_console().print(
        f"engine {plain(engine)}, {limits.workers} workers, chunks of {format_size(limits.chunk)}, "
        f"memory at most {format_size(limits.memory)}",
        soft_wrap=True,
    )  # fmt: skip


def tell_times(planning: float, converting: float) -> None:
    """Print on stderr how many seconds planning and converting took."""
    err_console().print(f"times  {planning:.2f} s to plan, {converting:.2f} s to convert and write")
