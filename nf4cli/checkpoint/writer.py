"""Writing safetensors in any order: a planned header, a file of its final size, pwrite.

The safetensors library writes whole tensors from memory; a stream needs the header first and the
bytes as they come.  So the header is encoded here, and every finished file is opened by the
library once as a check.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import MachineError
from .file_io import write_at
from .reader import ByteReader, read_shard
from .types import TensorInfo
from .untrusted import MAX_HEADER, MAX_TENSORS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Item = TypeVar("Item")
_HEADER_ROOM = MAX_HEADER - 1000
_PIECE = 1 << 20  # bytes read back at a time
_ALIGNMENT = 8  # bytes; as the safetensors library pads its own headers


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The complete header of a file that is not written yet.

    Attributes:
        filename: in the output directory.
        header: the first bytes of the file, length word included.
        tensors: by key, in offset order, with the offset in the file of each.
        size: bytes of the whole file.
        streamed: keys of the tensors that lie first in the file and are written from front to
            back; what follows them is small and comes in any order.
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


def fill_shards(
    items: Iterable[Item], entries: Callable[[Item], Sequence[Entry]], max_shard_size: int
) -> list[list[Item]]:
    """Items in order, cut into files of at most `max_shard_size` bytes of tensors; a larger item
    gets a file of its own.  A file gets no more tensors, and no longer a header, than readers
    take (`untrusted`).

    Args:
        entries: what is written for an item, which stays in one file.
    """
    files: list[list[Item]] = [[]]
    filled = tensors = header = 0
    for item in items:
        found = entries(item)
        nbytes = sum(TensorInfo(*entry, 0).nbytes for entry in found)
        room = sum(map(_header_room, found))
        if files[-1] and (
            filled + nbytes > max_shard_size
            or tensors + len(found) > MAX_TENSORS
            or header + room > _HEADER_ROOM
        ):
            files.append([])
            filled = tensors = header = 0
        filled, tensors, header = filled + nbytes, tensors + len(found), header + room
        files[-1].append(item)
    return files


def _header_room(entry: Entry) -> int:
    """Bytes that a tensor takes in a header, at most: braces, words and offsets take 100."""
    key, _, shape = entry
    return len(json.dumps(key, ensure_ascii=False).encode()) + 21 * len(shape) + 100


def lay_out(filename: str, bodies: Iterable[Entry], companions: Iterable[Entry]) -> ShardLayout:
    """Place tensors in a file, every one aligned to its dtype although no hole is allowed.

    Sizes that are multiples of 8 bytes come first, in the order given: the weights, which are
    then written, and can be digested, from front to back.  Then come multiples of 4, of 2 and
    the rest, so that nothing is ever pushed off its alignment.

    Args:
        bodies: packed and kept weights, in the order they will be written.
        companions: the quantization states.
    """

    def looseness(entry: Entry) -> int:
        """How far a tensor of this size can push the next one off an 8-byte boundary."""
        nbytes = TensorInfo(*entry, 0).nbytes
        return next(i for i, unit in enumerate((8, 4, 2, 1)) if nbytes % unit == 0)

    bodies = tuple(bodies)
    streamed = frozenset(entry[0] for entry in bodies if looseness(entry) == 0)
    ordered = sorted((*bodies, *companions), key=looseness)
    placed: list[TensorInfo] = []
    offset = 0
    for key, dtype, shape in ordered:
        placed.append(TensorInfo(key, dtype, shape, offset))
        offset = placed[-1].stop
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for t in placed:
        fields[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [t.start, t.stop],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors = {t.name: TensorInfo(t.name, t.dtype, t.shape, t.start + len(header)) for t in placed}
    return ShardLayout(filename, header, tensors, len(header) + offset, streamed)


def _allocate(fd: int, size: int) -> None:
    """Give a file its size; where the system can, reserve the blocks, so that a full disk is met
    here and not in mid-run."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        else:
            return
    os.truncate(fd, size)


class ShardWriter:
    """One output file, written at planned places by any thread in any order.

    Args:
        directory: an existing directory; the file must not exist in it, unless
        existing: the file is there, with this layout, and is written further.
    """

    def __init__(self, directory: Path, layout: ShardLayout, existing: bool = False) -> None:
        self.path = directory / layout.filename
        self.layout = layout
        new = os.O_NOFOLLOW if existing else os.O_CREAT | os.O_EXCL
        self._fd = os.open(self.path, os.O_RDWR | new, 0o644)
        try:
            _allocate(self._fd, layout.size)
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        write_at(self._fd, memoryview(layout.header), 0)

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Put `data` (contiguous bytes) at `offset` bytes into tensor `key`.

        Raises:
            OSError: the disk is full or fails.
        """
        tensor = self.layout.tensors[key]
        if offset + data.nbytes > tensor.nbytes:
            raise ValueError(f"{key}: {offset} + {data.nbytes} bytes of {tensor.nbytes}")
        write_at(self._fd, memoryview(data), tensor.start + offset)

    def reader(self) -> ByteReader:
        """Return what reads back from the file while it is being written."""
        return ByteReader(self.path, self.layout.size, self._fd)

    def tail(self) -> Iterator[NDArray[np.uint8]]:
        """Yield what lies behind the streamed tensors, read back from the file in pieces."""
        reader = self.reader()
        for start in range(self.layout.streamed_stop, self.layout.size, _PIECE):
            yield reader.read(start, min(_PIECE, self.layout.size - start))

    def finish(self) -> None:
        """Close the file and have the safetensors library read its header back.

        Raises:
            MachineError: what was written is not what was planned.
        """
        self.close()
        shard = read_shard(self.path)
        if {t.name: t for t in shard.tensors} != self.layout.tensors:
            raise MachineError(f"{self.path}: the header read back differs from the one written")

    def close(self) -> None:
        fd, self._fd = self._fd, -1  # first: a signal must not have it closed twice
        if fd >= 0:
            os.close(fd)
