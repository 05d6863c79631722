"""nf4cli.convert.dequantize: a 4-bit model back to an ordinary one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..convert.dequantize import Summary, plan_decoding, write_decoded
from ..convert.listener import Stage
from . import sources
from .machine import Machine
from .quantizing import SHARD_BYTES


@dataclass(frozen=True)
class Dequantized:
    """A finished run.

    Attributes:
        output: the new directory.
        parts: what was written, by component; "" is a checkpoint that is no part of a pipeline.
        engine: that decoded.
        seconds: that planning and writing took.
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
) -> Dequantized:
    """Decode a 4-bit checkpoint or pipeline into the new directory `output`.

    Raises:
        UsageError, InputError, MachineError, OSError: see `plan_decoding`, `write_decoded`.
    """
    machine = machine or Machine()
    place = sources.local(source, machine.listener)
    engine, started = machine.engine, time.monotonic()
    model = plan_decoding(place, engine, dtype, max_shard_size)
    limits = machine.resources(model.tensors)
    stage = Stage(
        "dequantizing", sum(plan.work_bytes for plan in model.parts.values()),
        f"{sources.shown(source, place)} -> {output}", place=output,
    )  # fmt: skip
    with machine.listener.stage(stage) as progress:
        parts = write_decoded(model, output, engine, limits, fsync, progress)
    return Dequantized(output, parts, engine.name, time.monotonic() - started)
