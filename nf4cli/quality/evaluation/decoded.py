"""Decode a 4-bit checkpoint into an ordinary one for the time of its evaluation.

Our decoder gives the weights of bitsandbytes' kernels, bit for bit. So the decoded model is the one
that users run, at the speed of an ordinary model, and only its weights differ from the source.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...checkpoint.bnb_format import find_quantized
from ...checkpoint.discovery import open_checkpoint
from ...convert.dequantize import plan_decoding, write_decoded
from ...engines.protocol import Engine
from ...planning.resources import Resources


@contextmanager
def decoded(path: Path, place: Path, engine: Engine, resources: Resources) -> Iterator[Path]:
    """Yield a directory with ordinary weights: `path` itself where nothing in it is 4-bit.

    Args:
        place: a directory with room for the decoded weights, which are removed at the end.

    Raises:
        InputError, MachineError: see `plan_decoding` and `write_decoded`.
    """
    checkpoint = open_checkpoint(path)
    if not find_quantized(checkpoint):
        yield path
        return
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".decoded-", dir=place) as directory:
        output = Path(directory) / path.name
        write_decoded(plan_decoding(path, engine), output, engine, resources, fsync=False)
        yield output
