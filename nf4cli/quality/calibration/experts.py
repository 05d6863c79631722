"""Measure the inputs of a mixture's experts, which transformers 5 holds fused in 3-D parameters.

The checkpoint has one matrix for each expert, and so has the output where its loader takes experts
in 4 bit (--target vllm). An expert sees the tokens that its router sends. For one that saw few, the
inputs of all experts together count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .side_by_side import is_beside

if TYPE_CHECKING:
    from ...engines.protocol import F32

FEWEST = 64
"""Tokens below which an expert's own importance is not trusted.

With 64 the mean square of a normal variable has a standard error of 18%; 8-bit scales need no
better.
"""

_NAME = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_DOWN = ("down_proj", "w2", "linear_2")


class ExpertWatcher:
    """Hooks that add up the squares of the inputs of a block's experts while it runs.

    Args:
        block: the module, with its weights.
        names: weights of the checkpoint that belong to the block.
    """

    def __init__(self, block: Any, names: Collection[str]) -> None:
        self._modules = [module for module in block.modules() if _is_fused(module)]
        self._names = [name for name in names if _NAME.fullmatch(name)]
        self._tokens: dict[int, int] = {}  # by expert
        self._sums: dict[tuple[int, bool], Any] = {}  # by expert, and whether of its down matrix

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what the experts are given until the end of the with statement."""
        handles = [module.register_forward_pre_hook(self._add) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: Any, args: Any) -> None:
        from torch.nn.functional import linear

        if is_beside():
            return
        states, index = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for expert in index.unique().tolist():
            if not 0 <= expert < module.gate_up_proj.shape[0]:
                continue
            rows = states[(index.reshape(len(states), -1) == expert).any(-1)].float()
            gate, up = linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            self._tokens[expert] = self._tokens.get(expert, 0) + len(rows)
            for down, inputs in ((False, rows), (True, module.act_fn(gate) * up)):
                squares = inputs.double().square().sum(0)
                self._sums[expert, down] = self._sums.get((expert, down), 0) + squares

    def importance(self, notify: Callable[[str], None]) -> dict[str, F32]:
        """Return the mean square of each column of each expert's inputs.

        Args:
            notify: told how many experts saw too few tokens.

        Returns:
            float32 arrays [columns] by weight; nothing for a block without fused experts.
        """
        if len(self._modules) != 1 or not self._sums:
            return {}
        total = sum(self._tokens.values())
        pooled = {
            down: sum(value for (_, kind), value in self._sums.items() if kind is down) / total
            for down in (False, True)
        }
        importance, few = {}, set()
        for name in self._names:
            match = _NAME.fullmatch(name)
            assert match is not None
            expert, down = int(match[2]), match[3] in _DOWN
            seen = self._tokens.get(expert, 0)
            if seen < FEWEST:
                few.add(expert)
                mean = pooled[down]
            else:
                mean = self._sums[expert, down] / seen
            importance[name] = np.ascontiguousarray(mean.float().cpu().numpy())
        if few:
            match = _NAME.fullmatch(self._names[0])
            place = match[1] if match else ""
            notify(
                f"{len(few):,} of {place}'s experts saw fewer than {FEWEST} tokens: their scales "
                "go by what all experts saw (more text helps)"
            )
        return importance


def _is_fused(module: Any) -> bool:
    """Return whether a module holds experts as most families do.

    That is: parameters [experts, out, in], with gate and up one after the other.
    """
    import torch

    up: Any = getattr(module, "gate_up_proj", None)
    down: Any = getattr(module, "down_proj", None)
    return bool(
        torch.is_tensor(up)  # elsewhere these names are linear layers
        and torch.is_tensor(down)
        and up.ndim == down.ndim == 3
        and hasattr(module, "act_fn")
        and up.shape[1] == 2 * down.shape[2]
        and up.shape[2] == down.shape[1]
    )
