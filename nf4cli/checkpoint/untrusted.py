"""Read what others wrote: files, names and JSON, with limits that a hostile file cannot pass.

Every limit is far above what published models need (the numbers are beside each), and low enough
that a hostile file costs a bounded amount of memory.  Reading never blocks, not even on a FIFO.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .file_io import Identity, identity_of

MAX_HEADER = 32_000_000
"""Bytes of a safetensors header; those of published files have less than 4 MB."""
MAX_TENSORS = 100_000
"""Tensors in one file; published files have a few thousand.  The writer keeps to it as well."""
MAX_ALL_TENSORS = 2_000_000
"""Tensors in all files of a checkpoint; the largest mixtures of experts have 140,000, packed
420,000.  A source of 184,000 weights gives 1,103,000.  The writer keeps to it as well."""
MAX_NAME = 1_000
"""Characters of a tensor's name; published ones have up to about 150."""
MAX_DIMENSIONS = 20
"""Dimensions of a tensor, on average over a file; published ones have up to 5."""
_MAX_DEPTH = 64  # levels of nested JSON; the deepest config.json of transformers has 6


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """Limits of a JSON file.

    Attributes:
        nbytes: bytes of the file.
        values: commas, opening brackets and braces in it, about as many as it has values.
    """

    nbytes: int
    values: int


SIDE_FILE = JsonLimits(16_000_000, 500_000)
"""Limits of config.json and similar files; published ones are below 1 MB."""
INDEX = JsonLimits(240_000_000, MAX_ALL_TENSORS)
"""Limits of an index: 57 MB is that of the largest packed mixtures of experts, 115 MB that of
1,103,000 tensors.  The writer keeps to them as well."""
RECORD = JsonLimits(500_000_000, 8_000_000)
"""Limits of a manifest, which has about 35 values and 1,200 bytes for each weight."""

# The errors of opening a file that are the input's fault; all others are the machine's.
_THEIR_ERRORS = {
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "it does not exist",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "it is a loop of symbolic links",
    errno.EISDIR: "it is a directory",
    errno.ENXIO: "it is no regular file",
}


# -- files ------------------------------------------------------------------------------------


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Opening never blocks; a plain open of a FIFO would wait for a writer.

    Raises:
        InputError: the path leads to nothing, a directory, a device, a FIFO or a loop of links.
        OSError: the file exists, but the machine or its permissions do not let us read it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise InputError(f"{path} cannot be a file: its name has a NUL") from error
    except OSError as error:
        if error.errno in _THEIR_ERRORS:
            raise InputError(
                f"{path} cannot be read: {_THEIR_ERRORS[error.errno]}; expected a regular file"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{path} is a directory or a device: expected a regular file")
    return fd


def is_regular(path: Path) -> bool:
    """Return whether a path leads to a regular file; False if that cannot be found out."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_start(path: Path, most: int) -> tuple[bytes, int, Identity]:
    """Read the start of a regular file.

    Args:
        most: bytes to read at most.

    Returns:
        (the bytes, the size of the file in bytes, its identity).

    Raises:
        InputError, OSError: see `open_regular`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        identity = identity_of(os.fstat(file.fileno()))
        return file.read(most), identity[2], identity


def is_plain(name: str) -> bool:
    """Return whether a name is that of an entry of a directory, and so cannot lead out of it."""
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def home_of(root: Path, shards: Iterable[Path] = ()) -> frozenset[Path]:
    """Return the real directories whose files may belong to a model.

    They are the model's own directory; the directories of its weight files, which may be links; and
    the `blobs` of a Hub's cache, since a snapshot there consists of links to ../../blobs.  A link
    to any other place could publish a private file of this machine together with the model.

    Args:
        root: directory of the model, or of a component of a pipeline.
        shards: its weight files.

    Raises:
        OSError, RuntimeError: a path is a loop of links.
    """
    home = root.resolve()
    directories = {home, *(path.resolve().parent for path in shards)}
    for place in (home, *home.parents):
        if place.parent.name == "snapshots":
            directories.add(place.parent.parent / "blobs")
    return frozenset(directories)


def leads_out(path: Path, root: Path, home: frozenset[Path]) -> bool:
    """Return whether a file of a model is a link to a file that is not part of the model.

    Args:
        home: the directories that `home_of` returns.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):
        return True
    return not real.is_relative_to(root.resolve()) and real.parent not in home


# -- JSON -------------------------------------------------------------------------------------


def read_json(path: Path, limits: JsonLimits = SIDE_FILE) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: the path leads to no regular file, the file is too large, or its content is
            rejected by `parse_json`.
        OSError: see `open_regular`.
    """
    data, *_ = read_start(path, limits.nbytes + 1)
    if len(data) > limits.nbytes:
        raise InputError(f"{path} is larger than {limits.nbytes:,} bytes: this is no {path.name}")
    return parse_json(data, str(path), limits)


def parse_json(data: bytes, where: str, limits: JsonLimits = SIDE_FILE) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: the text in UTF-8.
        where: the name of the text for messages.

    Raises:
        InputError: the text is not UTF-8, not JSON, or not an object; it has too many values, is
            nested too deep, or gives a key two different values.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > limits.values:
        raise InputError(f"{where} holds more than {limits.values:,} values: this is no such file")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if _is_deeper(value, _MAX_DEPTH):
        raise InputError(
            f"{where} is nested more than {_MAX_DEPTH} levels deep: this is no such file"
        )
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict.

    Raises:
        ValueError: a key has two different values; parsers differ in which of them they take.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        for key, value in pairs:
            if fields[key] != value:
                raise ValueError(f"the key {key[:100]!r} has two different values")
    return fields


def _is_deeper(value: Any, most: int) -> bool:
    """Return whether a JSON value has more than `most` levels of objects and lists."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


# -- what is shown ----------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return text that is safe to show in a terminal or a log.

    Escapes replace the characters that would move the cursor, change colours or the direction of
    writing, hide text, or begin a new line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else c
        for c in text
    )
