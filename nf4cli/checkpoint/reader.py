"""Read safetensors files: headers through the safetensors library, tensor bytes through pread.

The library validates the header (its size, the JSON, overlaps, gaps, the length of the file) and
gives names, dtypes and shapes.  It does not give the place of a tensor.  But the format allows no
gaps, so the places follow from the length of the header and the sizes in offset order.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError, MachineError
from ..format.dtypes import ITEMSIZE
from . import untrusted
from .file_io import Identity, identity_of, read_at
from .types import Shard, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LFS_MAGIC = b"version https://git-lfs"
_NEITHER_QUOTE_NOR_BRACE = bytes(set(range(256)) - set(b'"{'))


def read_shard(path: Path) -> Shard:
    """Read and validate the header of a file, but no tensor.

    Raises:
        InputError: the file is not a complete, valid safetensors file, or has a dtype that nf4
            cannot copy.
    """
    from safetensors import SafetensorError, safe_open

    header, length, size, identity = _read_header(path)
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
    # The library gives empty tensors at the same offset in any order.
    tensors.sort(key=lambda t: (t.start, t.stop, t.name))
    return Shard(path, size, data_start, tuple(tensors), identity)


def count_tensors(path: Path) -> int:
    """Return the number of tensors in a file, without parsing its header.

    Each tensor has one opening brace in the header, apart from braces within strings.  The header
    is not validated further, which is left to `read_shard`.

    Raises:
        InputError: the file is a Git LFS pointer, or its header is too large.
    """
    header, *_ = _read_header(path)
    not_tensors = 1 + (b'"__metadata__"' in header)  # the whole header, and its metadata
    unescaped = header.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes_and_braces = unescaped.translate(None, _NEITHER_QUOTE_NOR_BRACE)
    # Two quotes in a row can go: what lies within a string, and what outside, stays the same.
    outside_strings = quotes_and_braces.replace(b'""', b"").split(b'"')[::2]
    return max(0, sum(part.count(b"{") for part in outside_strings) - not_tensors)


def _read_header(path: Path) -> tuple[bytes, int, int, Identity]:
    """Read the header of a file, if its size is plausible.

    Returns:
        (the header's JSON, b"" if the file ends before it does; the length of the header and the
        size of the file, in bytes; the identity of the file).

    Raises:
        InputError: the file is a Git LFS pointer, or the header is too large.
    """
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
    return header, length, size, identity


def _refuse_absurd_length(path: Path, length: int) -> None:
    """Raise InputError if a header is longer than any that we would read."""
    if length > untrusted.MAX_HEADER:
        raise InputError(
            f"{path} has a header of {length:,} bytes, expected at most {untrusted.MAX_HEADER:,}: "
            "no model has such a header. Save it in several files"
        )


def _refuse_absurd(path: Path, header: bytes) -> None:
    """Raise InputError if a header would cost the library, or us, much memory."""
    # Every tensor has a brace of its own and every dimension a comma.
    if header.count(b"{") > untrusted.MAX_TENSORS + 2 or (
        header.count(b",") > untrusted.MAX_TENSORS * untrusted.MAX_DIMENSIONS
    ):
        raise InputError(
            f"{path} has a header of more than {untrusted.MAX_TENSORS:,} tensors, or of absurd "
            "shapes: no model has. Save it in several files"
        )


def _refuse_names(path: Path, names: list[str], header: bytes) -> None:
    """Raise InputError if a name is absurdly long, or the header lists one twice."""
    long = next((name for name in names if len(name) > untrusted.MAX_NAME), None)
    if long is not None:
        raise InputError(
            f"{path} has a tensor with a name of {len(long):,} characters ({long[:60]!r}...), "
            f"expected at most {untrusted.MAX_NAME:,}"
        )
    # The library drops one of two equal keys, so the header then has more braces than tensors.
    if header.count(b"{") > len(names) + 1:
        listed = json.loads(header, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
        twice = next((k for k, count in Counter(listed).items() if count > 1), None)
        if twice is not None:
            raise InputError(
                f"{path} lists {twice[:200]!r} twice in its header: readers differ in which they "
                "take. Save it again"
            )


class ByteReader:
    """Reads bytes of a file at any offset; several threads may share it.

    Args:
        path: the file.
        expected_size: the size of the file in bytes, which is checked when it is opened.
        fd: a descriptor of the file if it is open already; `close` leaves it open.

    Raises:
        InputError: the file has another size, or is no regular file any more.
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
        """Return the present identity of the open file."""
        return identity_of(os.fstat(self._fd))

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` with the bytes of the file from `offset`.

        Args:
            buffer: uint8, contiguous.

        Raises:
            InputError: the file ends before the buffer is full.
        """
        count = read_at(self._fd, memoryview(buffer), offset)
        if count < buffer.nbytes:
            self._truncated(offset + count)

    def read_rows(self, block: NDArray[np.uint8], offset: int, stride: int) -> None:
        """Fill the rows of `block` with bytes of the file; row i begins at offset + i * stride.

        Args:
            block: uint8 [rows, width].
            offset, stride: bytes.

        Raises:
            InputError: the file ends before the block is full.
        """
        from ..engines import cpu

        try:
            count = cpu.read_rows(self._fd, block, offset, stride)
        except MachineError:  # the torch engine runs without the compiled library
            for number, row in enumerate(block):
                self.read_into(row, offset + number * stride)
            return
        self._require_rows(count, block.shape, offset, stride)

    def read_columns(self, columns: NDArray[Any], offset: int, stride: int) -> None:
        """Fill the columns of an array with elements of the file; column i begins at
        offset + i * stride.

        Args:
            columns: [n, rows], elements of 1, 2, 4 or 8 bytes.
            offset, stride: bytes.

        Raises:
            InputError: the file ends before the array is full.
        """
        from ..engines import cpu

        count, rows = columns.shape
        try:
            done = cpu.read_columns(self._fd, columns, offset, stride)
        except MachineError:
            import numpy as np

            block = np.empty((rows, count * columns.itemsize), np.uint8)
            self.read_rows(block, offset, stride)
            columns[:] = block.view(columns.dtype).T
            return
        self._require_rows(done, (rows, count * columns.itemsize), offset, stride)

    def _require_rows(self, count: int, shape: tuple[int, ...], offset: int, stride: int) -> None:
        """Raise InputError if fewer bytes were read than rows of this shape (bytes) have."""
        height, width = shape
        if count < height * width:
            rows, rest = divmod(count, width)
            self._truncated(offset + rows * stride + rest)

    def _truncated(self, place: int) -> None:
        """Raise the InputError for a file that ends at byte `place`."""
        raise InputError(
            f"{self.path} ended at byte {place:,} while it was being read: "
            "it was truncated by another process"
        )

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        """Return `count` bytes from `offset` in a new array, uint8 [count].

        Raises:
            InputError: the file ends too early.
        """
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
    """The open files of a checkpoint, by shard; several threads may share them.

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
        """Close all files."""
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> ShardReaders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardSource(Protocol):
    """Opens the source files of a conversion, wherever they come from; used from any thread."""

    def open(self, shard: Shard) -> ByteReader:
        """Open a file, and wait until it is on the disk if it comes from a Hub.

        Called once for each file, in the order of the checkpoint's shards.

        Raises:
            InputError: the file is not the one whose header was read.
        """
        ...

    def read_tensor(self, shard: Shard, tensor: TensorInfo) -> NDArray[np.uint8]:
        """Return all bytes of a small tensor, uint8, whether its file is open or not."""
        ...

    def close(self, shard: Shard) -> None:
        """Close a file, of which nothing more will be read."""
        ...

    def abort(self) -> None:
        """Release every thread that waits in `open`, because the run has failed."""
        ...


class LocalShards:
    """The `ShardSource` for files on the disk, each of which is open only while it is read."""

    def __init__(self) -> None:
        self._readers: dict[Path, ByteReader] = {}

    def open(self, shard: Shard) -> ByteReader:
        """Open a file.

        Raises:
            InputError: the file is not the one whose header was read.
        """
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
        """Return all bytes of a small tensor, uint8."""
        with ByteReader(shard.path, shard.size) as reader:
            return reader.read(tensor.start, tensor.nbytes)

    def close(self, shard: Shard) -> None:
        """Close a file."""
        self._readers.pop(shard.path).close()

    def abort(self) -> None:
        """Do nothing, since no thread ever waits."""

    def __enter__(self) -> LocalShards:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()
