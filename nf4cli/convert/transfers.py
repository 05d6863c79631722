"""Count the bytes that a run moves over the network and holds on the disk."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class Transfers:
    """Bytes moved and held; every method is thread-safe, every field may be read at any time.

    Attributes:
        to_download, to_upload: in the whole run; 0 where nothing is moved that way.
        downloaded, uploaded: so far; bytes that need not be moved count as well.
        disk: on the disk now, or reserved there.
        most_disk: the largest value of `disk` so far.
        disk_limit: the bound that the user gave; None for none.
    """

    to_download: int = 0
    to_upload: int = 0
    downloaded: int = 0
    uploaded: int = 0
    disk: int = 0
    most_disk: int = 0
    disk_limit: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_downloaded(self, count: int) -> None:
        """Count bytes that arrived; a negative number where a download begins again."""
        with self._lock:
            self.downloaded += count

    def add_uploaded(self, count: int) -> None:
        """Count bytes that are on the Hub."""
        with self._lock:
            self.uploaded += count

    def hold(self, count: int) -> None:
        """Count bytes that lie on the disk or are reserved there; a negative number frees them."""
        with self._lock:
            self.disk += count
            self.most_disk = max(self.most_disk, self.disk)
