"""What a run finished: counted for its summary, told line by line under --verbose."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from ..records import ITEMSIZE
from ..watch import Listener
from .common import err_console, format_size, plain
from .views import WORDS

if TYPE_CHECKING:
    from ..engines import Notify
    from ..limits import Resources
    from ..planned import Plan, TensorPlan
    from ..records import Result
    from .progress import ProgressDisplay


class Ledger(Listener):
    """Args:
        display: is told what an earlier run did.
        verbose: every weight and file gets a line on stderr.
        notify: told what a user should know.

    Attributes:
        nbytes, weights: of the source, that this run converted.
        earlier: weight tensors that an earlier run had finished.
    """

    def __init__(self, display: ProgressDisplay, verbose: bool, notify: Notify) -> None:
        self._display, self._verbose, self._notify = display, verbose, notify
        self._lock = threading.Lock()
        self.nbytes = self.weights = self.earlier = 0

    def progress(self, name: str, nbytes: int) -> None:
        self._display(name, nbytes)

    def note(self, sentence: str) -> None:
        self._notify(sentence)

    def resumed(self, part: str, plans: Iterable[TensorPlan]) -> None:
        there = list(plans)
        self.earlier += len(there)
        if there:
            self._display.skip(sum(map(_source_bytes, there)))

    def tensor(self, part: str, plan: TensorPlan, result: Result) -> None:
        with self._lock:
            self.nbytes += _source_bytes(plan)
            self.weights += plan.numel
        if self._verbose:
            name = f"{part}/{plan.name}" if part else plan.name
            shape = "x".join(map(str, plan.weight.shape)) or "scalar"
            error = f"{result.error.rel_rmse:.4f}" if result.error else "-"
            self._tell(
                f"{WORDS[plan.action]:5}  {shape:>13}  error {error:6}  "
                f"{format_size(plan.nbytes_out):>9}  {plain(name)}"
            )

    def file(self, part: str, name: str, size: int) -> None:
        if self._verbose:
            whole = f"{part}/{name}" if part else name
            self._tell(f"file   {plain(whole)}, {format_size(size)}, is complete")

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # nobody reads it: no reason to end the work
            err_console().print(line, soft_wrap=True)


def tell_resources(engine: str, limits: Resources) -> None:
    """What a run may take of the machine."""
    err_console().print(
        f"engine {plain(engine)}, {limits.workers} workers, chunks of {format_size(limits.chunk)}, "
        f"memory at most {format_size(limits.memory)}",
        soft_wrap=True,
    )  # fmt: skip


def tell_times(planning: float, converting: float) -> None:
    """Seconds before and after the plan stood."""
    err_console().print(f"times  {planning:.2f} s to plan, {converting:.2f} s to convert and write")


def work_bytes(plan: Plan) -> int:
    """Bytes of the source that a run is told of when it has converted them."""
    return sum(_source_bytes(t) for t in plan.tensors if t.outputs)


def _source_bytes(plan: TensorPlan) -> int:
    return plan.numel * ITEMSIZE[plan.weight.stored.dtype]
