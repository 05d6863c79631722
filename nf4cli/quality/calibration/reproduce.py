"""Check that the calibration an output records is the one that a text gives.

The pass over the model is made again, with every block's weights replaced by those of the output.
So errors cannot add up from block to block: the measurements differ by the order of sums alone.
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
"""Largest relative difference of a column's importance or a weight's loss.

One thread and two differ by 4e-6 on SmolLM2-135M; another version of torch may add up in yet
another order.
"""


def matrices(weights: Mapping[str, PackedWeight], readers: ShardReaders, engine: Engine) -> Fixed:
    """Return a function that reads and decodes an output's matrix: float32 [rows, columns].

    Args:
        weights: the output's packed weights by name.
        readers: open while the function is used.
    """
    packed = PackedReader(readers, engine)

    def fixed(name: str) -> F32 | None:
        weight = weights.get(name)
        if weight is None:
            return None
        shape = weight.state.shape
        raw = packed.decode(weight, 0, int(np.prod(shape)), "F32")
        return raw.view(np.float32).reshape(shape)

    return fixed


def compare(recorded: ImportanceFile, measured: Calibration, report: Report) -> None:
    """Report every importance and loss that differs from the recorded one by more than TOLERANCE.

    Args:
        measured: a pass that is finished.
    """
    worst = 0.0
    for name, expected in recorded.columns.items():
        importance = measured.importance.get(name)
        if importance is None or importance.shape != expected.shape:
            report.add(
                "calibration", name, f"{IMPORTANCE} knows {name}, and the pass did not see it"
            )
            continue
        difference = _relative(importance, expected)
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
        measured_loss = measured.losses.get(name)
        if not isinstance(loss, (int, float)) or measured_loss is None:
            report.add("calibration", name, f"{IMPORTANCE}: the loss of {name} cannot be measured")
            continue
        difference = abs(measured_loss - loss) / max(abs(loss), 1e-9)
        worst = max(worst, difference)
        if difference > TOLERANCE:
            report.add(
                "calibration",
                name,
                f"{IMPORTANCE} has a loss of {loss:.6g} for {name}, and the text gives "
                f"{measured_loss:.6g}",
            )
    report.check(
        "calibration",
        f"importance and loss of {len(recorded.columns):,} weights are those that the text gives "
        f"(largest difference {worst:.1g} of itself)",
    )


def _relative(measured: F32, expected: F32) -> float:
    """Return the largest difference of a column, relative to what is expected.

    A column below a thousandth of the mean is taken as that large.
    """
    floor = max(float(expected.mean()) * 1e-3, 1e-30)
    return float((np.abs(measured - expected) / np.maximum(expected, np.float32(floor))).max())
