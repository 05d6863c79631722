"""The one way in for what others wrote: files, names and JSON, bounded before they are read.

Every limit lies far above what any published model has (the numbers are beside each) and far
below what hurts: a hostile file costs its reader a bounded amount of memory, and nothing waits.
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
"""Bytes of a safetensors header; those of published files are below 4 MB."""
MAX_TENSORS = 100_000
"""Tensors in one file; published files have a few thousand.  The writer cuts files here as well."""
MAX_ALL_TENSORS = 1_000_000
"""Tensors in all files of a checkpoint; the largest mixtures have 140,000, packed 420,000."""
MAX_NAME = 1_000
"""Characters of a tensor's name; published ones have up to about 150."""
MAX_DIMENSIONS = 20
"""Of a tensor, on average over a file; published ones have up to 5."""
_MAX_DEPTH = 64  # levels of JSON; the deepest config.json of transformers has 6


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """Attributes:
    nbytes: of the file.
    values: separators and brackets in it, about what it holds values.
    """

    nbytes: int
    values: int


SIDE_FILE = JsonLimits(16_000_000, 500_000)
"""config.json and its like; published ones are below 1 MB."""
INDEX = JsonLimits(64_000_000, MAX_ALL_TENSORS)
"""An index of the largest packed mixtures has 57 MB."""
RECORD = JsonLimits(500_000_000, 8_000_000)
"""A manifest: about 35 values and 1,200 bytes a weight."""

# What opening a path that others chose can meet; anything else is the machine's affair.
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
    """A descriptor of a regular file, for reading; never waits (a FIFO would, for a writer).

    Raises:
        InputError: there is none: nothing, a directory, a device, a FIFO, a loop of links.
        OSError: there is, and the machine or its permissions do not let us read it.
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
    """Whether a path leads to a regular file; False for whatever cannot even be looked at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_start(path: Path, most: int) -> tuple[bytes, int, Identity]:
    """(the first bytes of a regular file, at most `most`; its size; which file it is).

    Raises:
        InputError, OSError: see `open_regular`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        identity = identity_of(os.fstat(file.fileno()))
        return file.read(most), identity[2], identity


def is_plain(name: str) -> bool:
    """Whether a name that a file gives us is that of something directly beside it."""
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def home_of(root: Path, shards: Iterable[Path] = ()) -> frozenset[Path]:
    """The real directories that a model is made of.

    Its own; where its weights really lie, as somebody may link them together; and the blobs of the
    Hub's cache, whose snapshots are links to ../../blobs.  A link to anywhere else would publish a
    file of this machine together with the model.

    Args:
        root: the model's directory, or the pipeline's component's.
        shards: its weight files.
    """
    home = root.resolve()
    found = {home, *(path.resolve().parent for path in shards)}
    for place in (home, *home.parents):
        if place.parent.name == "snapshots":
            found.add(place.parent.parent / "blobs")
    return frozenset(found)


def leads_out(path: Path, root: Path, home: frozenset[Path]) -> bool:
    """Whether a file of a model is a link to something that is not the model's, see `home_of`."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):
        return True
    return not real.is_relative_to(root.resolve()) and real.parent not in home


# -- JSON -------------------------------------------------------------------------------------


def read_json(path: Path, limits: JsonLimits = SIDE_FILE) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: not a regular file, too large, or see `parse_json`.
    """
    data, *_ = read_start(path, limits.nbytes + 1)
    if len(data) > limits.nbytes:
        raise InputError(f"{path} is larger than {limits.nbytes:,} bytes: this is no {path.name}")
    return parse_json(data, str(path), limits)


def parse_json(data: bytes, where: str, limits: JsonLimits = SIDE_FILE) -> dict[str, Any]:
    """A JSON object from bytes.

    Args:
        where: what to call it in a message.

    Raises:
        InputError: not UTF-8, not JSON, too many values, nested too deep, not an object, or a key
            of it has two different values.
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
    """Parsers differ in which of two equal keys they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key[:100]!r} has two different values")
    return found


def _is_deeper(value: Any, most: int) -> bool:
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
    """Text for a terminal or a log: what would move the cursor, colour, hide, turn the direction
    of writing or begin a line of its own is shown as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else c
        for c in text
    )
