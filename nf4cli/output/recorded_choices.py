"""Read from an output what a proof cannot derive from the source: the answer of transformers, the
importance of inputs, and which codes error feedback chose."""

from __future__ import annotations

from ..checkpoint.discovery import IMPORTANCE, MANIFEST
from ..checkpoint.importance_file import ImportanceFile, load
from ..checkpoint.packed import PackedWeight
from ..checkpoint.types import Checkpoint
from ..errors import InputError
from ..format.config import QuantConfig
from ..planning import selection
from ..planning.answer import Answer
from .manifest import Manifest
from .report import Report


def recorded_answer(manifest: Manifest | None) -> Answer | None:
    """Return what transformers answered in the run that is checked, None where it was not asked."""
    if manifest is None or not manifest.config.asked:
        return None
    rearranged = selection.REARRANGED.name
    other_reasons = (selection.USER, selection.ENTANGLED, selection.FUSED_WITH, selection.NONFINITE)
    packable = {rule.name for rule in other_reasons}
    return Answer(
        version=manifest.config.asked.removeprefix("transformers "),
        quantized=frozenset(
            name
            for name, t in manifest.tensors.items()
            if t.action == "quantize" or t.rule in packable
        ),
        rearranged=frozenset(n for n, t in manifest.tensors.items() if t.rule == rearranged),
        float32=frozenset(
            name
            for name, t in manifest.tensors.items()
            if t.action == "copy" and t.source_dtype == "F32"
        ),
    )


def recorded_importance(
    checkpoint: Checkpoint, config: QuantConfig, report: Report
) -> ImportanceFile | None:
    """Return the importance file of an output, None if its scales were chosen without one.

    Report and return None if the file is missing, damaged or another one.

    Args:
        config: recipe of the output.
    """
    if not config.importance:
        return None
    try:
        importance = load(checkpoint.root / IMPORTANCE)
    except InputError as error:
        report.add("source", IMPORTANCE, f"the bytes cannot be derived from the source: {error}")
        return None
    if importance.digest != config.importance:
        report.add(
            "source",
            IMPORTANCE,
            f"{importance.path} is not the file that the scales were chosen by: its BLAKE3 is "
            f"{importance.digest}, {MANIFEST} has {config.importance}",
        )
        return None
    return importance


def fed_back(weights: dict[str, PackedWeight], manifest: Manifest) -> dict[str, PackedWeight]:
    """Return the weights whose codes were chosen by error feedback: those are not the nearest."""
    errors = {name: record.error for name, record in manifest.tensors.items()}
    return {
        name: weight
        for name, weight in weights.items()
        if (error := errors.get(name)) is not None and error.worst_block is not None
    }
