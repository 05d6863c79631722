"""How far a run is, how fast it goes and how long it will take, read off its counters."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .machine import free_disk, memory

if TYPE_CHECKING:
    from ...convert.transfers import Transfers

_WINDOW = 30.0  # seconds that a speed is taken over
_SAMPLE = 0.25  # seconds between two samples
_LEAST = 0.5  # seconds of samples that a speed needs


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that go one way.

    Attributes:
        done, total: bytes.
        speed: bytes a second in the last half minute, None where it is not known yet.
    """

    done: int
    total: int
    speed: float | None

    @property
    def left(self) -> float | None:
        """Seconds for the rest, None where nothing moves."""
        rest = max(0, self.total - self.done)
        if not rest:
            return 0.0
        return rest / self.speed if self.speed else None


@dataclass(frozen=True, slots=True)
class Reading:
    """A run at one moment.

    Attributes:
        work: bytes of the source (of verify: of all that is read).
        weights: parameters a second, None where they are not counted.
        left: seconds to the end, None where nobody can say.
        seconds: since the beginning.
        still: seconds since anything moved.
        current: what is being worked on.
        memory, free: bytes this process has in memory; free on the output's disk, None where the
            system does not say.
        download, upload: None where nothing is to go that way.
        disk, disk_limit: bytes held under --disk; the bound, None without one.
    """

    work: Flow
    weights: float | None
    left: float | None
    seconds: float
    still: float
    current: str
    memory: int | None
    free: int | None
    download: Flow | None = None
    upload: Flow | None = None
    disk: int = 0
    disk_limit: int | None = None

    @property
    def share(self) -> float:
        """Of the work, from 0 to 1."""
        return min(1.0, self.work.done / self.work.total) if self.work.total else 1.0


class Meter:
    """Counts; `add` may be called by any thread, and costs it an addition.

    Args:
        total: bytes of work.
        weights: parameters in them, 0 where they are not counted.  They are taken to lie evenly in
            the bytes, which is so where the source has one dtype.
        transfers: what the run moves besides.
        place: whose disk is looked at.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        weights: int = 0,
        transfers: Transfers | None = None,
        place: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._weights, self._transfers = total, weights, transfers
        self._place, self._clock = place, clock
        self._lock = threading.Lock()
        self._done = self._floor = 0
        self._current = ""
        self._began = self._moved = clock()
        self._samples: deque[tuple[float, tuple[int, int, int]]] = deque()
        self._samples.append((self._began, self._counts()))
        self._seen = self._counts()
        self._looked = -math.inf
        self._free: int | None = None

    def add(self, what: str, count: int) -> None:
        """`count` more bytes are done, of `what`."""
        with self._lock:
            self._done += count
            self._current = what

    def skip(self, count: int) -> None:
        """The next `count` bytes were done by an earlier run: they say nothing of the speed."""
        with self._lock:
            self._floor = max(self._floor, self._done) + count
            self._samples.clear()
            self._samples.append((self._clock(), self._counts()))

    @property
    def done(self) -> int:
        """Bytes, those of an earlier run included."""
        return self._done

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began

    def read(self) -> Reading:
        """How it stands; asked a few times a second, by one thread at a time."""
        with self._lock:
            now, counts, current = self._clock(), self._counts(), self._current
            if counts != self._seen:
                self._seen, self._moved = counts, now
            while len(self._samples) > 1 and now - self._samples[1][0] >= _WINDOW:
                self._samples.popleft()
            then, before = self._samples[0]
            if now - self._samples[-1][0] >= _SAMPLE:
                self._samples.append((now, counts))
        passed = now - then

        def flow(which: int, total: int) -> Flow:
            speed = (counts[which] - before[which]) / passed if passed >= _LEAST else None
            return Flow(counts[which], total, speed)

        work = flow(0, self._total)
        sent = self._transfers
        download = flow(1, sent.to_download) if sent and sent.to_download else None
        upload = flow(2, sent.to_upload) if sent and sent.to_upload else None
        rate = self._weights / self._total if self._weights and self._total else None
        return Reading(
            work=work,
            weights=None if rate is None or work.speed is None else work.speed * rate,
            left=_left(work, download, upload),
            seconds=now - self._began,
            still=now - self._moved,
            current=current,
            memory=memory(),
            free=self._free_disk(now),
            download=download,
            upload=upload,
            disk=sent.disk if sent else 0,
            disk_limit=sent.disk_limit if sent else None,
        )

    def _counts(self) -> tuple[int, int, int]:
        sent = self._transfers
        done = max(self._done, self._floor)
        return (done, sent.downloaded, sent.uploaded) if sent else (done, 0, 0)

    def _free_disk(self, now: float) -> int | None:
        if self._place is not None and now - self._looked >= 1:
            self._looked, self._free = now, free_disk(self._place)
        return self._free


def _left(work: Flow, download: Flow | None, upload: Flow | None) -> float | None:
    """Seconds to the end: the slowest way decides.

    While files come, the conversion goes at their pace, in bursts that say nothing.  None where
    nothing of what decides has moved yet.
    """
    coming = download is not None and download.done < download.total
    first = download.left if coming and download else work.left
    if first is None:
        return None
    return max(first, (upload.left or 0.0) if upload else 0.0)
