"""Measure how fast this machine converts, with a small model of random weights."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import stopping
from ..checkpoint.discovery import open_checkpoint
from ..engines.protocol import Engine
from ..format.config import QuantConfig
from ..planning.make_plan import make_plan
from ..planning.model_plan import ModelPlan
from ..planning.resources import Resources
from .write_model import Execution, write_model

_WEIGHTS, _SHAPE = 16, (2048, 1024)  # 64 MiB of bfloat16: a few hundredths of a second


def bytes_per_second(engine: Engine, resources: Resources, config: QuantConfig) -> float:
    """Return the bytes of source that a conversion with these options takes in a second.

    Digests and writing are included; the temporary directory stands for the disk.

    Raises:
        OSError: the temporary directory is full.
    """
    with stopping.whole(lambda: tempfile.TemporaryDirectory(prefix="nf4-")) as directory:
        source = Path(directory) / "trial.safetensors"
        _write(source)
        recipe = replace(
            config, keep=(), target="transformers", on_nonfinite="error", method="rtn",
            importance="",
        )  # fmt: skip
        plan = make_plan(open_checkpoint(source), recipe, lambda model: None)
        started = time.perf_counter()
        run = Execution(engine, resources, fsync=False)
        with stopping.held_back():  # it is not what the command is for
            write_model(ModelPlan.of(plan), Path(directory) / "output", run)
        return plan.source_bytes / (time.perf_counter() - started)


def _write(path: Path) -> None:
    """Write a file of normally distributed bfloat16 weights (the upper halves of float32)."""
    values = np.random.default_rng(0).standard_normal(_SHAPE, np.float32).view(np.uint32) >> 16
    data = values.astype("<u2").tobytes()
    header = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": list(_SHAPE),
            "data_offsets": [i * len(data), (i + 1) * len(data)],
        }
        for i in range(_WEIGHTS)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(_WEIGHTS):
            file.write(data)
