"""What a shell is offered for the values of options and for SOURCE.

A request is a run of nf4 while somebody waits at a prompt: nothing here opens a checkpoint or
imports a numerical library. An empty answer leaves the word to the shell, which completes files.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_CACHED = re.compile(r"models--([\w.]+(?:-[\w.]+)*(?:--[\w.]+(?:-[\w.]+)*)?)")
"""A model's directory in the cache of the Hub: models--ORG--NAME, or models--NAME."""


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
    """Models of the Hub that lie in the user's cache, where no file here begins like that."""
    directory, start = os.path.split(incomplete)
    with suppress(OSError):
        if any(place.name.startswith(start) for place in Path(directory).iterdir()):
            return []
    found = []
    with suppress(OSError):
        for place in _hub_cache().iterdir():
            if match := _CACHED.fullmatch(place.name):
                found.append(match[1].replace("--", "/"))
    return sorted(found)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models; importing it to ask takes longer than people wait."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    return Path(hub).expanduser() / "hub"
