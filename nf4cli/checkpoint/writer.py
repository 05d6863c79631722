"""Write safetensors files whose bytes arrive in any order: the header is planned before the data.

The safetensors library writes whole tensors from memory.  A stream needs the header first, then a
file of its final size that is filled with pwrite.  So the header is encoded here, and the library
opens every finished file once as a check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import MachineError
from ..format.dtypes import ITEMSIZE
from .file_io import allocate, write_at
from .reader import ByteReader, read_shard
from .types import TensorInfo
from .untrusted import MAX_HEADER, MAX_TENSORS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Item = TypeVar("Item")
_HEADER_ROOM = MAX_HEADER - 1000  # bytes for the tensors' entries in a header
_PIECE = 1 << 20  # bytes read back at a time
_ALIGNMENT = 8  # bytes: the safetensors library pads headers to a multiple of it, too


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The complete header of a file that is not written yet, and the places of its tensors.

    Attributes:
        filename: name in the output directory.
        header: the first bytes of the file, including the length of the header.
        tensors: key -> tensor with its offset in the file, in offset order.
        size: bytes of the whole file.
        streamed: keys of the tensors that lie first in the file and are written from front to
            back.  The tensors behind them are small and are written in any order.
    """

    filename: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int
    streamed: frozenset[str]

    @property
    def streamed_stop(self) -> int:
        """Offset in the file of the byte behind the last streamed tensor."""
        return max((self.tensors[key].stop for key in self.streamed), default=len(self.header))


Entry = tuple[str, str, tuple[int, ...]]
"""(key, dtype, shape) of a tensor to place."""


@dataclass(frozen=True, slots=True)
class _Room:
    """What tensors take of a file: bytes, entries in its header, and bytes of these at the most."""

    nbytes: int = 0
    tensors: int = 0
    header: int = 0

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> _Room:
        """Return what some tensors take."""
        nbytes = sum(nbytes_of(dtype, shape) for _, dtype, shape in entries)
        return cls(nbytes, len(entries), sum(map(_header_room, entries)))

    def __add__(self, other: _Room) -> _Room:
        """Return what both take."""
        return _Room(
            self.nbytes + other.nbytes, self.tensors + other.tensors, self.header + other.header
        )

    def fits(self, max_shard_size: int) -> bool:
        """Return whether a file may hold so much."""
        within = self.tensors <= MAX_TENSORS and self.header <= _HEADER_ROOM
        return within and self.nbytes <= max_shard_size


def fill_shards(
    items: Iterable[Item],
    entries: Callable[[Item], Sequence[Entry]],
    max_shard_size: int,
    group: Callable[[Item], object] | None = None,
) -> list[list[Item]]:
    """Distribute items over files, in order.

    A file gets at most `max_shard_size` bytes of tensors; a larger item gets a file of its own.
    The number of tensors and the length of the header also stay within what readers accept (see
    untrusted.py).

    Args:
        entries: returns the tensors of an item, which all go into the same file.
        group: returns what an item belongs to.  Neighbours of one group begin a new file if they
            would not all fit in the rest of one.  None to fill every file.

    Returns:
        The items of each file.
    """
    sized = [(item, _Room.of(entries(item))) for item in items]
    files: list[list[Item]] = [[]]
    filled = _Room()
    for _, members in groupby(sized, lambda pair: group(pair[0]) if group else None):
        together = list(members)
        if group and not sum((room for _, room in together), filled).fits(max_shard_size):
            filled = _begin_file(files)
        for item, room in together:
            if not (filled + room).fits(max_shard_size):
                filled = _begin_file(files)
            filled += room
            files[-1].append(item)
    return files


def _begin_file(files: list[list[Item]]) -> _Room:
    """Add an empty file, unless the last one is; return what is in it."""
    if files[-1]:
        files.append([])
    return _Room()


def _header_room(entry: Entry) -> int:
    """Return the most bytes that a tensor can take in a header.

    Braces, field names and offsets take at most 100, each dimension at most 21.
    """
    key, _, shape = entry
    plain = key.isascii() and key.isprintable() and '"' not in key and "\\" not in key
    quoted = len(key) + 2 if plain else len(json.dumps(key, ensure_ascii=False).encode())
    return quoted + 21 * len(shape) + 100


def lay_out(filename: str, bodies: Iterable[Entry], companions: Iterable[Entry]) -> ShardLayout:
    """Place tensors in a file so that each is aligned to its dtype, although no gaps are allowed.

    Tensors whose size is a multiple of 8 bytes come first, in the given order.  These are the
    weights, which are written, and can be digested, from front to back.  Then come multiples of 4,
    multiples of 2, and the rest.  So every tensor starts at a multiple of its dtype's size.

    Args:
        bodies: packed and kept weights, in the order in which they will be written.
        companions: the tensors of the quantization states.
    """

    def looseness(entry: Entry) -> int:
        """Return 0 for a size that is a multiple of 8 bytes, then 1 of 4, 2 of 2, and 3."""
        return _LOOSENESS[nbytes_of(entry[1], entry[2]) % 8]

    bodies = tuple(bodies)
    streamed = frozenset(entry[0] for entry in bodies if looseness(entry) == 0)
    ordered = sorted((*bodies, *companions), key=looseness)
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, offset = [], 0
    for key, dtype, shape in ordered:
        starts.append(offset)
        offset += nbytes_of(dtype, shape)
        fields[key] = {"dtype": dtype, "shape": shape, "data_offsets": (starts[-1], offset)}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors = {
        entry[0]: TensorInfo(*entry, start + len(header))
        for entry, start in zip(ordered, starts, strict=True)
    }
    return ShardLayout(filename, header, tensors, len(header) + offset, streamed)


_LOOSENESS = (0, 3, 2, 3, 1, 3, 2, 3)  # by the rest of a size that is divided by 8


@cache
def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; a model has a million of a few shapes."""
    return prod(shape) * ITEMSIZE[dtype]


class ShardWriter:
    """An output file whose tensors any thread may write, in any order.

    Args:
        directory: an existing directory.
        layout: the header and the places of the tensors.
        existing: whether the file exists, with this layout, and is continued.  Otherwise it must
            not exist.

    Raises:
        OSError: the file exists (or does not, with `existing`), or the disk is full or fails.
    """

    def __init__(self, directory: Path, layout: ShardLayout, existing: bool = False) -> None:
        self.path = directory / layout.filename
        self.layout = layout
        new = os.O_NOFOLLOW if existing else os.O_CREAT | os.O_EXCL
        self._fd = os.open(self.path, os.O_RDWR | new, 0o644)
        try:
            allocate(self._fd, layout.size)
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        write_at(self._fd, memoryview(layout.header), 0)

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Write a part of a tensor.

        Args:
            key: the tensor.
            offset: bytes from the start of the tensor.
            data: uint8, contiguous.

        Raises:
            OSError: the disk is full or fails.
            ValueError: the bytes reach beyond the end of the tensor.
        """
        tensor = self.layout.tensors[key]
        if offset + data.nbytes > tensor.nbytes:
            raise ValueError(f"{key}: {offset} + {data.nbytes} bytes of {tensor.nbytes}")
        write_at(self._fd, memoryview(data), tensor.start + offset)

    def reader(self) -> ByteReader:
        """Return a reader of the file, which may be used while the file is being written."""
        return ByteReader(self.path, self.layout.size, self._fd)

    def tail(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes behind the streamed tensors in pieces, read back from the file."""
        reader = self.reader()
        for start in range(self.layout.streamed_stop, self.layout.size, _PIECE):
            yield reader.read(start, min(_PIECE, self.layout.size - start))

    def finish(self) -> None:
        """Close the file, and have the safetensors library read its header as a check.

        Raises:
            InputError: the file is not a valid safetensors file.
            MachineError: the header differs from the planned one.
        """
        self.close()
        shard = read_shard(self.path)
        if {t.name: t for t in shard.tensors} != self.layout.tensors:
            raise MachineError(f"{self.path}: the header read back differs from the one written")

    def close(self) -> None:
        """Close the file; does nothing if it is closed."""
        fd, self._fd = self._fd, -1  # before os.close, so that a signal cannot cause a second one
        if fd >= 0:
            os.close(fd)
