"""Decode a 4-bit model into an ordinary one: the work of `nf4cli.dequantize`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.adapter_files import largest_matrix
from ..convert.dequantize import Summary, plan_decoding, write_decoded
from ..convert.listener import Stage
from . import sources
from .adapters import read_adapters
from .machine import Machine
from .request import SHARD_BYTES


@dataclass(frozen=True)
class Dequantized:
    """The result of a run.

    Attributes:
        output: the new directory.
        parts: counts of what was written, by component; "" is a checkpoint without a pipeline.
        engine: name of the engine that decoded.
        seconds: time of planning and writing.
    """

    output: Path
    parts: Mapping[str, Summary]
    engine: str
    seconds: float


def decode(
    source: Path,
    output: Path,
    dtype: str = "auto",
    max_shard_size: int = SHARD_BYTES,
    fsync: bool = True,
    machine: Machine | None = None,
    adapters: Sequence[Path] = (),
    adapter_scales: Sequence[float] = (),
) -> Dequantized:
    """Decode a 4-bit checkpoint or pipeline into the new directory `output`.

    Args:
        dtype: of all floats, "auto" for the original ones.
        max_shard_size: bytes of the largest output file.
        fsync: wait until every file is on the disk.
        adapters, adapter_scales: merged into the decoded weights, see `Request`.

    Raises:
        UsageError, InputError, MachineError, OSError: see `plan_decoding`, `write_decoded`.
    """
    machine = machine or Machine()
    place = sources.shared(source, machine)
    engine, started = machine.engine, time.monotonic()
    merging = read_adapters(adapters, adapter_scales, machine)
    model = plan_decoding(place, engine, dtype, max_shard_size, merging)
    for note in model.notes:
        machine.listener.note(note)
    limits = machine.resources(model.tensors, merged=largest_matrix(merging))
    stage = Stage(
        "dequantizing", sum(plan.work_bytes for plan in model.parts.values()),
        f"{sources.shown(source, place)} -> {output}", place=output,
        crowd=machine.crowd,
    )  # fmt: skip
    with machine.listener.stage(stage) as progress:
        parts = write_decoded(model, output, engine, limits, fsync, progress, machine.cluster)
    return Dequantized(output, parts, machine.called, time.monotonic() - started)
