"""Describe what an adapter does to a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoint.types import Placed


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that an adapter stores.

    Attributes:
        placed: the tensor and its file.
        turned: whether its transpose is meant.
    """

    placed: Placed
    turned: bool = False

    @property
    def turn(self) -> Matrix:
        """The transpose."""
        return replace(self, turned=not self.turned)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter does to one weight.

    With `right`: weight + scale * (left @ right), for DoRA each row then scaled to its magnitude.
    Without: weight + scale * left; or, with `replaces`, left instead of the weight.

    Attributes:
        adapter: its name, for messages.
        left: [rows, rank]; without `right`, of the weight's own shape.
        right: [rank, columns].
        scale: of the product.
        magnitude: of each row, for DoRA.
        replaces: whether the weight's own values do not count.
    """

    adapter: str
    left: Matrix
    right: Matrix | None = None
    scale: float = 1.0
    magnitude: Placed | None = None
    replaces: bool = False

    @property
    def turn(self) -> Delta:
        """The same for the transpose of the weight."""
        if self.right is None:
            return replace(self, left=self.left.turn)
        return replace(self, left=self.right.turn, right=self.left.turn)

    @property
    def files(self) -> tuple[Placed, ...]:
        """The tensors that it is made of."""
        matrices = (self.left, self.right) if self.right else (self.left,)
        return (*(m.placed for m in matrices), *((self.magnitude,) if self.magnitude else ()))
