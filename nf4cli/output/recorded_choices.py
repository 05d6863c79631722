"""What a proof takes from an output's own record, because it follows from nothing else: the answer
of transformers, the importance of inputs, the codes that error feedback chose."""

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
    """What transformers answered in the run that is checked, as its manifest has it."""
    if manifest is None or not manifest.config.asked:
        return None
    rearranged = selection.REARRANGED.name
    kept = (selection.USER, selection.ENTANGLED, selection.FUSED_WITH, selection.NONFINITE)
    packable = {rule.name for rule in kept}
    return Answer(
        version=manifest.config.asked.removeprefix("transformers "),
        quantized=frozenset(
            name
            for name, t in manifest.tensors.items()
            if t.action == "quantize" or t.rule in packable
        ),
        rearranged=frozenset(n for n, t in manifest.tensors.items() if t.rule == rearranged),
    )


def recorded_importance(
    checkpoint: Checkpoint, config: QuantConfig, report: Report
) -> ImportanceFile | None:
    """What the scales were weighted by, from the output itself; None, and why in the report."""
    if not config.importance:
        return None
    try:
        found = load(checkpoint.root / IMPORTANCE)
    except InputError as error:
        report.add("source", IMPORTANCE, f"the bytes cannot be derived from the source: {error}")
        return None
    if found.digest != config.importance:
        report.add(
            "source",
            IMPORTANCE,
            f"{found.path} is not the file that the scales were chosen by: its BLAKE3 is "
            f"{found.digest}, {MANIFEST} has {config.importance}",
        )
        return None
    return found


def fed_back(weights: dict[str, PackedWeight], manifest: Manifest) -> dict[str, PackedWeight]:
    """Those whose codes are not the nearest, as the manifest has it."""
    errors = {name: record.error for name, record in manifest.tensors.items()}
    return {
        name: weight
        for name, weight in weights.items()
        if (error := errors.get(name)) is not None and error.worst_block is not None
    }
