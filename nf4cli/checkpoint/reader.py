"""Reading safetensors: headers through the safetensors library, bytes through pread.

The library validates the header (size cap, JSON, overlaps, holes, file length), and tells names,
dtypes and shapes.  It does not tell where a tensor lies, but the format allows no holes: in
offset order the byte ranges follow from the header's length and the sizes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError, MachineError
from ..format.dtypes import ITEMSIZE
from . import untrusted
from .file_io import Identity, identity_of, read_at
from .types import Shard, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LFS_MAGIC = b"version https://git-lfs"


def read_shard(path: Path) -> Shard:
    """Read and validate the header of one file; no tensor byte is touched.

    Raises:
        InputError: it is not a complete, valid safetensors file of dtypes we can copy.
    """
    from safetensors import SafetensorError, safe_open

    head, size, identity = untrusted.read_start(path, len(_LFS_MAGIC))
    if head == _LFS_MAGIC:
        raise InputError(
            f"{path} is a Git LFS pointer ({size} bytes), not the file itself: run "
            "'git lfs pull' in its repository, or download the file again"
        )
    length = int.from_bytes(head[:8], "little")
    _refuse_absurd_length(path, min(length, size - 8))
    header = untrusted.read_start(path, 8 + length)[0][8:] if length < size else b""
    _refuse_absurd(path, header)
    try:
        with safe_open(path, "numpy") as file:
            entries = []
            for name in file.offset_keys():
                view = file.get_slice(name)
                entries.append((name, str(view.get_dtype()), tuple(view.get_shape())))
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({size:,} bytes): {error}. "
            "Download or save it again"
        ) from error
    _refuse_names(path, [name for name, _, _ in entries], header)
    del header
    data_start = 8 + length
    tensors = []
    offset = data_start
    for name, dtype, shape in entries:
        if dtype not in ITEMSIZE:
            raise InputError(
                f"{path}: tensor {name!r} has dtype {dtype}, which nf4 cannot read; "
                f"it reads {', '.join(ITEMSIZE)}"
            )
        tensor = TensorInfo(name, dtype, shape, offset)
        tensors.append(tensor)
        offset = tensor.stop
    if offset != size:
        raise InputError(
            f"{path}: the header describes {offset:,} bytes but the file has {size:,}. "
            "Download or save it again"
        )
    # The library leaves the order of empty tensors at one offset to chance.
    tensors.sort(key=lambda t: (t.start, t.stop, t.name))
    return Shard(path, size, data_start, tuple(tensors), identity)


def _refuse_absurd_length(path: Path, length: int) -> None:
    """Raises InputError for more bytes of a header than we would read."""
    if length > untrusted.MAX_HEADER:
        raise InputError(
            f"{path} has a header of {length:,} bytes, expected at most {untrusted.MAX_HEADER:,}: "
            "no model has such a header. Save it in several files"
        )


def _refuse_absurd(path: Path, header: bytes) -> None:
    """Raises InputError for a header that would cost the library, or us, much memory."""
    # Every tensor has a brace of its own and every dimension a comma.
    if header.count(b"{") > untrusted.MAX_TENSORS + 2 or (
        header.count(b",") > untrusted.MAX_TENSORS * untrusted.MAX_DIMENSIONS
    ):
        raise InputError(
            f"{path} has a header of more than {untrusted.MAX_TENSORS:,} tensors, or of absurd "
            "shapes: no model has. Save it in several files"
        )


def _refuse_names(path: Path, names: list[str], header: bytes) -> None:
    """Raises InputError for names that are absurdly long, or that the header has twice."""
    long = next((name for name in names if len(name) > untrusted.MAX_NAME), None)
    if long is not None:
        raise InputError(
            f"{path} has a tensor with a name of {len(long):,} characters ({long[:60]!r}...), "
            f"expected at most {untrusted.MAX_NAME:,}"
        )
    # The library keeps one of two equal keys; only then can there be more braces than tensors.
    if header.count(b"{") > len(names) + 1:
        listed = json.loads(header, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
        twice = next((k for k, count in Counter(listed).items() if count > 1), None)
        if twice is not None:
            raise InputError(
                f"{path} lists {twice[:200]!r} twice in its header: readers differ in which they "
                "take. Save it again"
            )


class ByteReader:
    """Positioned reads from one file; safe to share between threads.

    Args:
        path: the file.
        expected_size: bytes it must have (it is checked when it is opened).
        fd: the file, where it is open already; it stays so when this is closed.

    Raises:
        InputError: the file has another size by now.
    """

    def __init__(self, path: Path, expected_size: int, fd: int | None = None) -> None:
        self.path = path
        self._lent = fd is not None
        self._fd = untrusted.open_regular(path) if fd is None else fd
        size = self.identity()[2]
        if size != expected_size:
            self.close()
            raise InputError(
                f"{path} changed while it was being read: it had {expected_size:,} bytes, "
                f"now {size:,}"
            )

    def identity(self) -> Identity:
        """Which file is open, in which state, now."""
        return identity_of(os.fstat(self._fd))

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` (contiguous bytes) from `offset` in the file.

        Raises:
            InputError: the file ends before the buffer is full.
        """
        count = read_at(self._fd, memoryview(buffer), offset)
        if count < buffer.nbytes:
            self._truncated(offset + count)

    def read_rows(self, block: NDArray[np.uint8], offset: int, stride: int) -> None:
        """Fill `block` [rows, width] with runs of bytes that lie `stride` apart from `offset` on.

        Raises:
            InputError: the file ends before the block is full.
        """
        from ..engines import cpu

        try:
            count = cpu.read_rows(self._fd, block, offset, stride)
        except MachineError:  # the torch engine runs without the compiled library
            for row, run in enumerate(block):
                self.read_into(run, offset + row * stride)
            return
        if count < block.nbytes:
            rows, rest = divmod(count, block.shape[1])
            self._truncated(offset + rows * stride + rest)

    def _truncated(self, place: int) -> None:
        raise InputError(
            f"{self.path} ended at byte {place:,} while it was being read: "
            "it was truncated by another process"
        )

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from `offset`, in a new array."""
        import numpy as np

        buffer = np.empty(count, np.uint8)
        self.read_into(buffer, offset)
        return buffer

    def close(self) -> None:
        """Close the file, unless it was lent."""
        if not self._lent:
            os.close(self._fd)

    def __enter__(self) -> ByteReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardReaders:
    """The open files of a checkpoint; safe to share between threads.

    Raises:
        InputError: a file changed in size since its header was read.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._readers: dict[Path, ByteReader] = {}
        try:
            for shard in shards:
                self._readers[shard.path] = ByteReader(shard.path, shard.size)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, shard: Shard) -> ByteReader:
        return self._readers[shard.path]

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> ShardReaders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardSource(Protocol):
    """Where a conversion has its source files from; used from any thread."""

    def open(self, shard: Shard) -> ByteReader:
        """Called once a file, in the order of the checkpoint's; may wait until the file is here.

        Raises:
            InputError: it is not the file whose header was read.
        """
        ...

    def read_tensor(self, shard: Shard, tensor: TensorInfo) -> NDArray[np.uint8]:
        """All bytes of a small tensor, whether its file is open or not."""
        ...

    def close(self, shard: Shard) -> None:
        """Nothing more is read of this file."""
        ...

    def abort(self) -> None:
        """The run has failed: let go of every thread that waits in `open`."""
        ...


class LocalShards:
    """Source files that lie on the disk, each open only while it is read."""

    def __init__(self) -> None:
        self._readers: dict[Path, ByteReader] = {}

    def open(self, shard: Shard) -> ByteReader:
        """Raises InputError when it is not the file whose header was read."""
        reader = ByteReader(shard.path, shard.size)
        if reader.identity() != shard.identity and read_shard(shard.path).tensors != shard.tensors:
            reader.close()
            raise InputError(
                f"{shard.path} was replaced since its header was read: start again when nothing "
                "writes to it any more"
            )
        self._readers[shard.path] = reader
        return reader

    def read_tensor(self, shard: Shard, tensor: TensorInfo) -> NDArray[np.uint8]:
        """All bytes of a small tensor."""
        with ByteReader(shard.path, shard.size) as reader:
            return reader.read(tensor.start, tensor.nbytes)

    def close(self, shard: Shard) -> None:
        self._readers.pop(shard.path).close()

    def abort(self) -> None:
        """Nobody waits."""

    def __enter__(self) -> LocalShards:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()
