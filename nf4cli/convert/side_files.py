"""Write the files of an output that lie beside its shards: configuration, index, copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.discovery import index_name
from ..checkpoint.types import Checkpoint


def clear(directory: Path, keep: Collection[Path]) -> None:
    """Remove everything in `directory` but the files and directories of `keep`."""
    for path in sorted(directory.iterdir()):
        if path in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_side_files(
    directory: Path,
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    index: Mapping[str, Any] | None,
) -> None:
    """Write an output's copied files, config.json and index.

    Args:
        checkpoint: the source; its files are copied, but never its config.json.
        config: the new config.json; None for none.
        index: of the shards; None where a single file needs none.
    """
    for name in checkpoint.extra_files:
        if name != "config.json":
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.root / name, target)
    if config:
        (directory / "config.json").write_text(_config_text(config), "utf-8")
    if index is not None:
        name = index_name(checkpoint.stem)
        (directory / name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _config_text(config: Mapping[str, Any]) -> str:
    """Return config.json as transformers formats it."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only JSON's escapes can carry
        text = json.dumps(config, indent=2)
    return text + "\n"
