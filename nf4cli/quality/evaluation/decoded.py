"""A 4-bit checkpoint as an ordinary one, for as long as it is evaluated.

What bitsandbytes' kernels make of the codes is what ours do, bit for bit; so the decoded weights
are the model that users run, without bitsandbytes, at the speed of an ordinary model, and nothing
but the weights differs from the source.
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
    """A directory with ordinary weights: `path` itself where they are.

    Args:
        place: where there is room for the decoded weights.

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
