"""Open a 4-bit model in its own library: the work of `nf4cli.load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..convert.listener import Listener
from ..loading.opening import open_model
from . import sources


def opened(
    path: Path, class_name: str | None, options: Mapping[str, Any], listener: Listener
) -> Any:
    """Return the model of a 4-bit checkpoint or pipeline.

    Raises:
        UsageError, InputError, MachineError: see `open_model` and `sources.local`.
    """
    place = sources.local(path, listener)
    return open_model(place, str(sources.shown(path, place)), class_name, options)
