"""Run a block over all windows side by side: no run passes a linear layer before all stand there.

So one pass over a block is enough. A layer is measured on all windows, then rounded, and only then
do they go on through it, to the layers behind it. A run is a greenlet: it stops in the middle of
the block's own code, in the one thread that torch computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet


class Run(greenlet):  # type: ignore[misc]  # greenlet comes without types
    """One window's way through a block.

    Args:
        window: its number.
        work: runs the block.
        beside: whether it only shows what the unrounded model is given, and is not measured.

    Attributes:
        window, beside: as given.
        layer: name of the layer that it stands before; None before the start, and at the end.
        states: what that layer is about to be given.
        shared: whether the layer before was given the same tensor, as k and v are after q.
    """

    def __init__(self, window: int, work: Callable[[], object], beside: bool = False) -> None:
        super().__init__(work)
        self.window, self.beside = window, beside
        self.layer: str | None = None
        self.states: Any = None
        self.shared = False

    def stop(self, layer: str, states: Any) -> None:
        """Hand back to who called `go_on`, from within the work."""
        self.shared = self.states is states
        self.layer, self.states = layer, states
        self.parent.switch()

    def go_on(self) -> None:
        """Run until the next stop or the end.

        Raises:
            Exception: what the work raised.
        """
        self.layer = None
        self.switch()
        if self.dead:
            self.states = None

    def rows(self) -> Any:
        """Return what the layer is about to be given: float32 tensor [tokens, columns]."""
        return self.states.reshape(-1, self.states.shape[-1]).float()


def is_beside() -> bool:
    """Return whether the code that asks is in a run that is not measured."""
    return getattr(getcurrent(), "beside", False)


class Stops:
    """Where runs stop: before each of a block's linear layers that has not been passed.

    Args:
        linears: modules by the name of their weight.
    """

    def __init__(self, linears: Mapping[str, Any]) -> None:
        self._linears = linears
        self._order = {name: number for number, name in enumerate(linears)}
        self._passed: set[str] = set()

    @contextmanager
    def watching(self, runs: Sequence[Run]) -> Iterator[None]:
        """Have runs stop until the end of the with statement, which ends those that still stand."""
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self._linears.items()
        ]
        try:
            yield
        finally:
            for run in runs:
                if run:  # it has started, and not ended
                    run.throw()
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            run = getcurrent()
            if isinstance(run, Run) and name not in self._passed:
                run.stop(name, args[0])

        return hook

    def next_layer(self, runs: Sequence[Run]) -> str | None:
        """Return the first layer that a run stands before, and count it as passed; None at the end.

        A router sends windows through layers of their own: those behind wait for those before.
        """
        layers = {run.layer for run in runs if run.layer is not None}
        if not layers:
            return None
        first = min(layers, key=self._order.__getitem__)
        self._passed.add(first)
        return first
