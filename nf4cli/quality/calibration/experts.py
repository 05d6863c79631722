"""What goes into the experts of a mixture, which transformers 5 holds fused in 3-D parameters.

The checkpoint has a matrix an expert, and so has the output where its loader takes experts in 4 bit
(--target vllm). An expert sees the tokens that its router sends; one that saw few is given what all
of them saw together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ...engines.protocol import F32

FEWEST = 64
"""Tokens below which an expert's own importance is not trusted: with 64 the mean square of a normal
variable is known within 18%, its standard error, and 8-bit scales do not need it better."""

_NAME = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_DOWN = ("down_proj", "w2", "linear_2")


class ExpertWatcher:
    """Adds up the squares of a block's experts' inputs while it runs.

    Args:
        block: the module, with its weights.
        names: weights in the checkpoint that belong to it.
    """

    def __init__(self, block: Any, names: Collection[str]) -> None:
        self._modules = [module for module in block.modules() if _is_fused(module)]
        self._names = [name for name in names if _NAME.fullmatch(name)]
        self._tokens: dict[int, int] = {}
        self._sums: dict[tuple[int, bool], Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._add) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: Any, args: Any) -> None:
        from torch.nn.functional import linear

        states, index = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for expert in index.unique().tolist():
            if not 0 <= expert < module.gate_up_proj.shape[0]:
                continue
            rows = states[(index.reshape(len(states), -1) == expert).any(-1)].float()
            gate, up = linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            self._tokens[expert] = self._tokens.get(expert, 0) + len(rows)
            for down, given in ((False, rows), (True, module.act_fn(gate) * up)):
                squares = given.double().square().sum(0)
                self._sums[expert, down] = self._sums.get((expert, down), 0) + squares

    def importance(self, notify: Callable[[str], None]) -> dict[str, F32]:
        """float32 [columns] by weight."""
        if len(self._modules) != 1 or not self._sums:
            return {}
        total = sum(self._tokens.values())
        pooled = {
            down: sum(value for (_, kind), value in self._sums.items() if kind is down) / total
            for down in (False, True)
        }
        found, few = {}, set()
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
            found[name] = np.ascontiguousarray(mean.float().cpu().numpy())
        if few:
            match = _NAME.fullmatch(self._names[0])
            place = match[1] if match else ""
            notify(
                f"{len(few):,} of {place}'s experts saw fewer than {FEWEST} tokens: their scales "
                "go by what all experts saw (more text helps)"
            )
        return found


def _is_fused(module: Any) -> bool:
    """Experts as most families have them: [experts, out, in], gate and up one after the other."""
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
