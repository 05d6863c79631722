"""Whole reads and writes at a place in a file, whatever the kernel hands over at once; which file
it is, and that it lies on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

Identity = tuple[int, int, int, int, int]
"""(device, inode, bytes, modified, changed), the times in nanoseconds: another one may be another
file or other bytes, the same one is the same bytes (see `is_settled`)."""

_TICK = 2_000_000_000  # nanoseconds; no file system stamps its files more coarsely (FAT: 2 s)


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`; returns the bytes read, fewer only at the end of the file."""
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
        count = os.pwrite(fd, view[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        done += count


def identity_of(stat: os.stat_result) -> Identity:
    """Which file this is, in which state."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_settled(identity: Identity, now: int) -> bool:
    """Whether a change after `now` (nanoseconds) shows in the file's times: a second change within
    one tick of the clock that stamps files would not."""
    return now - max(identity[3:]) > _TICK


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk.

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
    """Return what a path is called, `.` and a link that leads nowhere included."""
    return os.path.basename(os.path.abspath(path))  # noqa: PTH100 - resolve() fails on loops
