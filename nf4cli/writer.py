"""Writing safetensors in any order: a planned header, a file of its final size, pwrite.

The safetensors library writes whole tensors from memory; a stream needs the header first and the
bytes as they come.  So the header is encoded here, and every finished file is opened by the
library once as a check.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MachineError
from .reader import ByteReader, read_shard
from .records import Shard, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
        directory: an existing directory; the file must not exist in it.
    """

    def __init__(self, directory: Path, layout: ShardLayout) -> None:
        self.path = directory / layout.filename
        self.layout = layout
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _allocate(self._fd, layout.size)
        self._write_at(0, memoryview(layout.header))

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Put `data` (contiguous bytes) at `offset` bytes into tensor `key`.

        Raises:
            OSError: the disk is full or fails.
        """
        tensor = self.layout.tensors[key]
        if offset + data.nbytes > tensor.nbytes:
            raise ValueError(f"{key}: {offset} + {data.nbytes} bytes of {tensor.nbytes}")
        self._write_at(tensor.start + offset, memoryview(data))

    def tail(self) -> Iterator[NDArray[np.uint8]]:
        """What lies behind the streamed tensors, read back from the file in pieces."""
        with ByteReader(self.path, self.layout.size) as reader:
            for start in range(self.layout.streamed_stop, self.layout.size, _PIECE):
                yield reader.read(start, min(_PIECE, self.layout.size - start))

    def _write_at(self, position: int, view: memoryview) -> None:
        while view.nbytes:
            count = os.pwrite(self._fd, view, position)
            view = view[count:]
            position += count

    def finish(self, fsync: bool) -> Shard:
        """Close the file and have the safetensors library read its header back.

        Raises:
            MachineError: what was written is not what was planned.
        """
        if fsync:
            os.fsync(self._fd)
        self.close()
        shard = read_shard(self.path)
        if {t.name: t for t in shard.tensors} != self.layout.tensors:
            raise MachineError(f"{self.path}: the header read back differs from the one written")
        return shard

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
