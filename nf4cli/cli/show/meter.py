"""Measure how far a run is, how fast it goes and how long it will take."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...process_memory import resident_bytes

if TYPE_CHECKING:
    from ...convert.tasks import Crowd
    from ...convert.transfers import Transfers

_WINDOW = 30.0  # seconds that a speed is taken over
_SAMPLE = 0.25  # seconds between two samples
_SHORTEST = 0.5  # seconds of samples that a speed needs


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that are worked on, fetched or uploaded.

    Attributes:
        done, total: bytes.
        speed: bytes a second in the last half minute, None where it is not known yet.
    """

    done: int
    total: int
    speed: float | None

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take, None where nothing moves."""
        rest = max(0, self.total - self.done)
        if not rest:
            return 0.0
        return rest / self.speed if self.speed else None


@dataclass(frozen=True, slots=True)
class Reading:
    """A run at one moment.

    Attributes:
        work: bytes of the source; of verify, all bytes that are read.
        weights: parameters a second, None where they are not counted.
        left: seconds to the end, None where it is not known yet.
        seconds: time since the beginning.
        still: seconds since anything moved.
        current: name of the weight or file in work.
        memory: bytes of this process in memory, None where the system does not say.
        free: bytes free on the output's disk, None where the system does not say.
        download, upload: None where nothing is fetched or uploaded.
        disk: bytes held on the disk under --disk.
        disk_limit: value of --disk, None without it.
        crowd: machines and files, None where this machine does it all.
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
    crowd: Crowd | None = None

    @property
    def share(self) -> float:
        """Share of the work that is done, from 0 to 1."""
        return min(1.0, self.work.done / self.work.total) if self.work.total else 1.0


class Meter:
    """The counters of a run; any thread may call `add`.

    Args:
        total: bytes of work.
        weights: parameters in the work, 0 where they are not counted. They are taken to lie evenly
            in the bytes, as in a source of one dtype.
        transfers: counters of what the run fetches and uploads.
        place: a path on the disk whose free bytes are shown.
        clock: returns seconds.
        crowd: see `Reading`.
    """

    def __init__(
        self,
        total: int,
        weights: int = 0,
        transfers: Transfers | None = None,
        place: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        crowd: Crowd | None = None,
    ) -> None:
        self._crowd = crowd
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
        """Count `count` more bytes of `what` as done."""
        with self._lock:
            self._done += count
            self._current = what

    def skip(self, count: int) -> None:
        """Count the next `count` bytes as done by an earlier run, and not for the speed."""
        with self._lock:
            self._floor = max(self._floor, self._done) + count
            self._samples.clear()
            self._samples.append((self._clock(), self._counts()))

    @property
    def done(self) -> int:
        """Bytes done, with those of an earlier run."""
        return self._done

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    def read(self) -> Reading:
        """Return the state of the run now; called by one thread at a time."""
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
            speed = (counts[which] - before[which]) / passed if passed >= _SHORTEST else None
            return Flow(counts[which], total, speed)

        work = flow(0, self._total)
        moved = self._transfers
        download = flow(1, moved.to_download) if moved and moved.to_download else None
        upload = flow(2, moved.to_upload) if moved and moved.to_upload else None
        rate = self._weights / self._total if self._weights and self._total else None
        return Reading(
            work=work,
            weights=None if rate is None or work.speed is None else work.speed * rate,
            left=_left(work, download, upload),
            seconds=now - self._began,
            still=now - self._moved,
            current=current,
            memory=resident_bytes(),
            free=self._free_disk(now),
            download=download,
            upload=upload,
            disk=moved.disk if moved else 0,
            disk_limit=moved.disk_limit if moved else None,
            crowd=self._crowd,
        )

    def _counts(self) -> tuple[int, int, int]:
        """Return the bytes of work done, fetched and uploaded."""
        moved = self._transfers
        done = max(self._done, self._floor)
        return (done, moved.downloaded, moved.uploaded) if moved else (done, 0, 0)

    def _free_disk(self, now: float) -> int | None:
        """Return the bytes free on the disk, asked at most once a second."""
        if self._place is not None and now - self._looked >= 1:
            self._looked, self._free = now, free_disk(self._place)
        return self._free


def _left(work: Flow, download: Flow | None, upload: Flow | None) -> float | None:
    """Return the seconds to the end, by the slowest of work, download and upload.

    While files are fetched, the conversion follows them in bursts, and only their speed counts.
    None where what decides has not moved yet.
    """
    coming = download is not None and download.done < download.total
    first = download.left if coming and download else work.left
    if first is None:
        return None
    return max(first, (upload.left or 0.0) if upload else 0.0)


def free_disk(place: Path) -> int | None:
    """Return the bytes free on the disk of a path, which need not exist; None if not known."""
    try:
        place = place.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free
    except OSError:
        return None
