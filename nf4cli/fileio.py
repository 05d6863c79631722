"""Whole reads and writes at a place in a file, whatever the kernel hands over at once."""

from __future__ import annotations

import os


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
        done += os.pwrite(fd, view[done:], offset + done)
