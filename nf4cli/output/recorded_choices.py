"""Read from an output what a proof cannot derive from the source: the answer of transformers, the
importance of inputs, which codes error feedback chose, and which files the run copied."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod

from ..checkpoint.discovery import (
    CARD,
    IMPORTANCE,
    MANIFEST,
    is_weight_file,
    sentence_transformers_modules,
)
from ..checkpoint.importance_file import ImportanceFile, load
from ..checkpoint.packed import PackedWeight
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import is_plain, is_regular
from ..errors import InputError
from ..format.config import QuantConfig
from ..format.dtypes import FLOAT64, ITEMSIZE, TORCH_NAME
from ..planning import selection
from ..planning.answer import Answer
from .manifest import Manifest, SourceRecord, TensorRecord
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


def recorded_copies(original: Checkpoint, manifest: Manifest | None, report: Report) -> Checkpoint:
    """Return a source whose files to copy are those that its output has by its manifest.

    A run also copies what --copy names, and earlier versions copied everything but weights.

    Args:
        manifest: None for the output of another program.
        report: takes the names of files that cannot be compared.
    """
    if manifest is None:
        return original
    listed, in_source = copied_names(manifest), {*original.extra_files, *original.left_files}
    if original.is_file:
        in_source.update(n for n in listed if is_plain(n) and is_regular(original.root / n))
    present = {name for name in listed & in_source if is_regular(original.root / name)}
    if missing := sorted(listed & in_source - present):
        report.unchecked.append(
            f"that {', '.join(missing[:10])} of the output came from the source: not fetched"
        )
    since = {
        name for name in original.extra_files if name not in listed and _is_new(original, name)
    }
    if since:
        report.unchecked.append(
            f"{', '.join(sorted(since)[:10])} of the source, which the output lacks: the version "
            "of nf4 that wrote it copied no such files"
        )
    names = ({*original.extra_files} - since) | present
    left = tuple(name for name in original.left_files if name not in names)
    return replace(original, extra_files=tuple(sorted(names)), left_files=left)


def copied_names(manifest: Manifest) -> set[str]:
    """Return the files of an output that its run copied, by its manifest."""
    shards = {record.output_file for record in manifest.tensors.values()}
    names = {name for name in manifest.output_files if not _is_index(name)}
    return names - shards - {"config.json", IMPORTANCE, MANIFEST, CARD}


def _is_index(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors.index.json")


def _is_new(original: Checkpoint, name: str) -> bool:
    """Return whether nf4 0.2.0 and earlier did not copy a file that is copied now."""
    if original.is_file:
        return True
    of_module = (original.root / name).parent in sentence_transformers_modules(original.root)
    return is_weight_file(name.rpartition("/")[2]) and not of_module


def fed_back(weights: dict[str, PackedWeight], manifest: Manifest) -> dict[str, PackedWeight]:
    """Return the weights whose codes were chosen by error feedback: those are not the nearest."""
    errors = {name: record.error for name, record in manifest.tensors.items()}
    return {
        name: weight
        for name, weight in weights.items()
        if (error := errors.get(name)) is not None and error.worst_block is not None
    }


_IN_A_STACK = re.compile(r".*\bexperts\.([0-9]+\.\w+)\.(?:weight|weight_packed|qweight)")
"""Name of a stored matrix of an expert, or of its codes."""


def matrices_of(
    weight: PackedWeight, record: TensorRecord
) -> list[tuple[str, tuple[int, ...]]] | None:
    """Return (name, shape) of the matrices that a packed stack of experts was made from, in order.

    Returns:
        None where it was made from none, or where they do not fill it in whole blocks, so that the
        record is not of this stack.
    """
    path, stack = selection.module_path(weight.name), weight.state.shape
    count = len(record.parts)
    if not count or len(stack) != 3 or stack[0] * stack[1] % count:
        return None
    shape = (stack[0] * stack[1] // count, stack[2])
    names = {}
    for part in record.parts:
        match = _IN_A_STACK.fullmatch(part.tensor)
        if match is None or not _holds(part, shape):
            return None
        names[f"{path}.{match[1]}.weight"] = shape
    is_whole = len(names) == count and prod(shape) % weight.state.blocksize == 0
    return list(names.items()) if is_whole else None


def _holds(part: SourceRecord, shape: tuple[int, int]) -> bool:
    """Return whether a stored tensor may be a matrix, or its codes of 4 or 8 bits."""
    if part.dtype in (*TORCH_NAME, FLOAT64):
        return part.shape == shape
    bits = 8 * prod(part.shape) * ITEMSIZE.get(part.dtype, 0)
    return bits in (4 * prod(shape), 8 * prod(shape))
