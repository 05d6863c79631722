"""Basic file operations: complete reads and writes at an offset, a file's identity, syncing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

Identity = tuple[int, int, int, int, int]
"""(device, inode, size in bytes, mtime, ctime) of a file, the times in nanoseconds.  If it is the
same as before, so are the bytes (but see `is_settled`); if not, the bytes may be others."""

_WRITE = 512 << 10
"""Bytes of one write.  For a larger one Linux 6.18 takes larger pages for its cache, and five times
as long (docs/measurements.md: 1.6 s instead of 0.3 s of a conversion)."""
_TICK = 2_000_000_000  # nanoseconds: the coarsest clock of a file system's times (FAT has 2 s)


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` with the bytes of a file from `offset`.

    Returns:
        Bytes read, fewer than `view` holds only where the file ends.

    Raises:
        OSError: the disk failed.
    """
    done = 0
    while done < view.nbytes:
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`.

    Raises:
        OSError: the disk is full or fails.
    """
    done = 0
    while done < view.nbytes:
        count = os.pwrite(fd, view[done : done + _WRITE], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        done += count


def identity_of(stat: os.stat_result) -> Identity:
    """Return the identity of a file: which one it is, and which state it is in."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_settled(identity: Identity, now: int) -> bool:
    """Return whether a change of the file after `now` would change its identity.

    A change within the same tick of the file system's clock as the last one would not.

    Args:
        now: the time in nanoseconds.
    """
    return now - max(identity[3:]) > _TICK


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's list of names, are on the disk.

    Raises:
        OSError: the disk failed.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def name_of(path: Path) -> str:
    """Return the last part of a path's absolute form, also of `.` and of a broken link."""
    return os.path.basename(os.path.abspath(path))  # noqa: PTH100 - resolve() fails on loops


def allocate(fd: int, size: int) -> None:
    """Give a file its final size, and reserve its blocks if the file system can.

    A disk without enough room is then found here and not in mid-run.

    Raises:
        OSError: the disk is full or fails.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        else:
            return
    os.truncate(fd, size)
