"""Complete the values of options and SOURCE in a shell.

Each completion is a run of nf4 while somebody waits at a prompt, so nothing here opens a checkpoint
or imports a numerical library. After an empty answer the shell completes names of files.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_CACHED = re.compile(r"models--([\w.]+(?:-[\w.]+)*(?:--[\w.]+(?:-[\w.]+)*)?)")
"""A model's directory in the Hub's cache: models--ORG--NAME, or models--NAME."""


def quant_types() -> list[str]:
    from ..format.config import QUANT_TYPES

    return list(QUANT_TYPES)


def blocksizes() -> list[str]:
    from ..format.config import BLOCKSIZES

    return [str(size) for size in BLOCKSIZES]


def dtypes() -> list[str]:
    from ..format.dtypes import SAFETENSORS_NAME

    return ["auto", *SAFETENSORS_NAME]


def storages() -> list[str]:
    from ..format.dtypes import STORAGE_NAME

    return list(STORAGE_NAME)


def targets() -> list[str]:
    from ..format.config import TARGETS

    return list(TARGETS)


def on_nonfinite() -> list[str]:
    from ..format.config import ON_NONFINITE

    return list(ON_NONFINITE)


def scales() -> list[str]:
    from ..format.config import SCALES

    return list(SCALES)


def methods() -> list[str]:
    from ..format.config import METHODS

    return list(METHODS)


def digests() -> list[str]:
    from ..checkpoint.digest import ALGORITHMS

    return ["auto", *ALGORITHMS]


def engines() -> list[str]:
    from ..engines import NAMES

    return list(NAMES)


def sources(incomplete: str) -> list[str]:
    """Return the Hub's models in the user's cache; none where a file begins with `incomplete`."""
    directory, start = os.path.split(incomplete)
    with suppress(OSError):
        if any(place.name.startswith(start) for place in Path(directory).iterdir()):
            return []
    models = []
    with suppress(OSError):
        for place in _hub_cache().iterdir():
            if match := _CACHED.fullmatch(place.name):
                models.append(match[1].replace("--", "/"))
    return sorted(models)


def _hub_cache() -> Path:
    """Return the directory of huggingface_hub's cache, without its slow import."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    return Path(hub).expanduser() / "hub"
