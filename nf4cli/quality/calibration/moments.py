"""Add up the inputs of a block's linear layers: their squares, and products of columns."""

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
    """The sums of one input, which one or several linear layers share.

    Attributes:
        names: the weights of these layers.
        tokens: rows seen.
        squares: float64 tensor [columns], the sum of squares; None before the first rows.
        products: float32 tensor [columns, columns], the sum of x^T x; None where it is not asked
            for.
    """

    names: list[str]
    tokens: int = 0
    squares: Any = None
    products: Any = None

    def add(self, rows: Any, full: bool) -> None:
        """Add rows to the sums.

        Args:
            rows: float32 tensor [tokens, columns].
            full: add up the products of columns as well.
        """
        self.tokens += len(rows)
        squares = rows.double().square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        if full:
            products = rows.T @ rows
            self.products = products if self.products is None else self.products.add_(products)

    @property
    def importance(self) -> F32:
        """float32 array [columns], the mean square."""
        mean: F32 = (self.squares / max(1, self.tokens)).float().cpu().numpy()
        return np.ascontiguousarray(mean)

    @property
    def second(self) -> Any:
        """float32 tensor [columns, columns], the mean of x^T x.

        Where only squares were added up: [columns], its diagonal.
        """
        if self.products is None:
            return (self.squares / max(1, self.tokens)).float()
        return self.products / max(1, self.tokens)


class Watcher:
    """Hooks that add up the inputs of a block's linear layers while it runs.

    Args:
        linears: modules by the name of their weight.
        full: add up x^T x as well, 4 bytes for each pair of columns.
    """

    def __init__(self, linears: Mapping[str, Any], full: bool) -> None:
        self._linears, self._full = linears, full
        self._moments: dict[str, Moments] = {}  # by weight
        self._last: tuple[Any, Moments] | None = None  # an input, and its sums

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what the layers are given until the end of the with statement."""
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
            states = args[0]
            if self._last is not None and self._last[0] is states:  # q, k and v have one input
                if name not in self._moments:
                    self._moments[name] = self._last[1]
                    self._moments[name].names.append(name)
                return
            moments = self._moments.setdefault(name, Moments([name]))
            moments.add(states.reshape(-1, states.shape[-1]).float(), self._full)
            self._last = states, moments

        return hook

    @property
    def moments(self) -> list[Moments]:
        """The sums of each distinct input, of all layers that were called."""
        return list({id(moments): moments for moments in self._moments.values()}.values())
