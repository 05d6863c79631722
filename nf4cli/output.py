"""What an output holds beside its shards, and what is copied into it as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import Checkpoint
from .source import index_name


def clear(directory: Path, keep: Collection[Path]) -> None:
    """Remove what an earlier run left in `directory`, but the files and directories of `keep`."""
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
    """Everything of an output but its shards: what is copied, config.json, the index.

    Args:
        config: the new config.json, None for none; the source's is never copied.
        index: None where a single file needs none.
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


@dataclass(frozen=True, slots=True)
class Copies:
    """Files that go into an output as they are.

    Attributes:
        root: where they come from.
        files: path in the output -> path under root.
        texts: path in the output -> its content, which the source has in another form.
        left: paths under root that are not copied.
    """

    root: Path
    files: dict[str, str]
    texts: dict[str, str]
    left: list[str]

    @property
    def nbytes(self) -> int:
        copied = sum((self.root / name).stat().st_size for name in self.files.values())
        return copied + sum(len(text.encode()) for text in self.texts.values())

    def write(self, directory: Path) -> None:
        for name, source in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / source, directory / name)
        for name, text in self.texts.items():
            (directory / name).write_text(text, "utf-8")


def _config_text(config: Mapping[str, Any]) -> str:
    """config.json as transformers formats it."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only JSON's escapes can carry
        text = json.dumps(config, indent=2)
    return text + "\n"
