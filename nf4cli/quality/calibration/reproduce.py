"""Is the calibration that an output records the one that this text gives?

The same pass is made again, with every block rounded to what the output holds, so nothing can drift
apart on the way: what is measured differs by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ...checkpoint.discovery import IMPORTANCE
from ...checkpoint.importance_file import ImportanceFile
from ...checkpoint.packed import PackedReader, PackedWeight
from ...checkpoint.reader import ShardReaders
from ...engines.protocol import Engine
from ...output.report import Report
from .passes import Calibration, Fixed

if TYPE_CHECKING:
    from ...engines.protocol import F32

TOLERANCE = 1e-3
"""Of a column's importance or a weight's loss, relative. One thread against two differs by 4e-6 on
SmolLM2-135M; another torch adds up in another order again."""


def matrices(weights: Mapping[str, PackedWeight], readers: ShardReaders, engine: Engine) -> Fixed:
    """The decoded matrices of an output, float32 [rows, columns], read when they are asked for."""
    packed = PackedReader(readers, engine)

    def fixed(name: str) -> F32 | None:
        weight = weights.get(name)
        if weight is None:
            return None
        shape = weight.state.shape
        raw = packed.decode(weight, 0, int(np.prod(shape)), "F32")
        return raw.view(np.float32).reshape(shape)

    return fixed


def compare(recorded: ImportanceFile, found: Calibration, report: Report) -> None:
    """Report what was measured otherwise than it is recorded."""
    worst = 0.0
    for name, there in recorded.columns.items():
        here = found.importance.get(name)
        if here is None or here.shape != there.shape:
            report.add(
                "calibration", name, f"{IMPORTANCE} knows {name}, and the pass did not see it"
            )
            continue
        difference = _relative(here, there)
        worst = max(worst, difference)
        if difference > TOLERANCE:
            report.add(
                "calibration",
                name,
                f"{IMPORTANCE}: the importance of {name} differs from what the text gives by "
                f"{difference:.2g} of itself, expected at most {TOLERANCE:g}",
            )
    losses = recorded.about.get("losses")
    for name, loss in (losses if isinstance(losses, dict) else {}).items():
        here_loss = found.losses.get(name)
        if not isinstance(loss, (int, float)) or here_loss is None:
            report.add("calibration", name, f"{IMPORTANCE}: the loss of {name} cannot be measured")
            continue
        difference = abs(here_loss - loss) / max(abs(loss), 1e-9)
        worst = max(worst, difference)
        if difference > TOLERANCE:
            report.add(
                "calibration",
                name,
                f"{IMPORTANCE} has a loss of {loss:.6g} for {name}, and the text gives "
                f"{here_loss:.6g}",
            )
    report.check(
        "calibration",
        f"importance and loss of {len(recorded.columns):,} weights are those that the text gives "
        f"(largest difference {worst:.1g} of itself)",
    )


def _relative(here: F32, there: F32) -> float:
    """The largest difference of a column, in units of itself or of a thousandth of the mean."""
    floor = max(float(there.mean()) * 1e-3, 1e-30)
    return float((np.abs(here - there) / np.maximum(there, np.float32(floor))).max())
