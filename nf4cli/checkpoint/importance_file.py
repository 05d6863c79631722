"""Importance files: how much each input column of each weight matters for the model's output.

An importance file is a small safetensors file that can be kept and shared.  For each weight, under
its name in the checkpoint, it holds float32 [columns]: the mean square of the weight's input in
that column, over the calibration text.  The metadata has a JSON object under "nf4_importance" that
says how it was measured (docs/quality.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .digest import digest_file
from .reader import ByteReader, read_shard
from .untrusted import parse_json

if TYPE_CHECKING:
    from ..engines.protocol import F32

_KEY, _VERSION = "nf4_importance", 1
_MOST_BYTES = 1_000_000_000  # a model of 671 B weights has 10 MB, or 2 GB with all its experts


@dataclass(frozen=True, slots=True)
class ImportanceFile:
    """An importance file that was read and checked.

    Attributes:
        path: where it lies.
        digest: BLAKE3 of its bytes.
        columns: weight -> float32 [columns], finite and not negative.
        about: the metadata: version, tokens, text, model.
    """

    path: Path
    digest: str
    columns: Mapping[str, F32]
    about: Mapping[str, Any]


def save(path: Path, columns: Mapping[str, F32], about: Mapping[str, Any]) -> None:
    """Write an importance file; the same content gives the same bytes.

    Args:
        columns: weight -> float32 [columns].
        about: the metadata, JSON values by name.

    Raises:
        OSError: the disk is full or fails.
    """
    from safetensors.numpy import save as serialize

    text = json.dumps({"version": _VERSION, **about}, sort_keys=True)
    tensors = {name: np.ascontiguousarray(columns[name], np.float32) for name in sorted(columns)}
    path.write_bytes(serialize(tensors, {_KEY: text}))


def load(path: Path) -> ImportanceFile:
    """Read an importance file and check every value.

    Raises:
        InputError: the file is no importance file, damaged, or of another version.
    """
    from safetensors import safe_open

    shard = read_shard(path)
    if shard.size > _MOST_BYTES:
        raise InputError(f"{path} has {shard.size:,} bytes: an importance file is far smaller")
    with safe_open(path, "numpy") as file:
        about = (file.metadata() or {}).get(_KEY)
    if about is None:
        raise InputError(
            f"{path} is no importance file: its header has no {_KEY!r}. Make one with nf4 quantize "
            "--calibration TEXT --save-importance FILE"
        )
    metadata = parse_json(about.encode(), f"{_KEY} in {path}")
    if metadata.get("version") != _VERSION:
        raise InputError(
            f"{path} is an importance file of version {metadata.get('version')!r}; this version of "
            f"nf4 reads {_VERSION}"
        )
    columns = {}
    with ByteReader(path, shard.size) as reader:
        for tensor in shard.tensors:
            if tensor.dtype != "F32" or len(tensor.shape) != 1:
                raise InputError(
                    f"{path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected F32 "
                    "and one value an input column"
                )
            values = reader.read(tensor.start, tensor.nbytes).view(np.float32)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise InputError(
                    f"{path}: {tensor.name} holds a value that is negative or not finite: measure "
                    "it again"
                )
            columns[tensor.name] = values
    return ImportanceFile(path, digest_file(path, "blake3"), columns, metadata)
