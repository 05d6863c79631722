"""What goes into the linear layers of a block, added up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ...engines.protocol import F32


@dataclass(eq=False)
class Moments:
    """Of one input that one or several linear layers share.

    Attributes:
        names: their weights.
        tokens: rows seen.
        squares: float64 tensor [columns], sum of squares, or None.
        products: float32 tensor [columns, columns], sum of x^T x, or None.
    """

    names: list[str]
    tokens: int = 0
    squares: Any = None
    products: Any = None

    def add(self, rows: Any, full: bool) -> None:
        """rows: float32 tensor [tokens, columns]."""
        self.tokens += len(rows)
        squares = rows.double().square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        if full:
            products = rows.T @ rows
            self.products = products if self.products is None else self.products.add_(products)

    @property
    def importance(self) -> F32:
        """float32 [columns], the mean square."""
        mean: F32 = (self.squares / max(1, self.tokens)).float().cpu().numpy()
        return np.ascontiguousarray(mean)

    @property
    def second(self) -> Any:
        """float32 tensor [columns, columns], the mean of x^T x; where that was not added up,
        [columns], its diagonal."""
        if self.products is None:
            return (self.squares / max(1, self.tokens)).float()
        return self.products / max(1, self.tokens)


class Watcher:
    """Adds up the inputs of a block's linear layers while it runs.

    Args:
        linears: by the name of their weight.
        full: add up x^T x as well, 4 bytes a pair of columns.
    """

    def __init__(self, linears: Mapping[str, Any], full: bool) -> None:
        self._linears, self._full = linears, full
        self._of: dict[str, Moments] = {}
        self._last: tuple[Any, Moments] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self._linears.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            given = args[0]
            if self._last is not None and self._last[0] is given and name not in self._of:
                self._of[name] = self._last[1]  # q, k and v have one input
                self._of[name].names.append(name)
                return
            if self._last is not None and self._last[0] is given:
                return
            moments = self._of.setdefault(name, Moments([name]))
            moments.add(given.reshape(-1, given.shape[-1]).float(), self._full)
            self._last = given, moments

        return hook

    @property
    def moments(self) -> list[Moments]:
        """One for each input, of all layers that were called."""
        return list({id(found): found for found in self._of.values()}.values())
