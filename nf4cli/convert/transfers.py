"""What a run moves over the network and holds on the disk: counted here, shown by the terminal."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class Transfers:
    """Bytes; every method is thread-safe, and the fields may be read at any time.

    Attributes:
        to_download, to_upload: in the whole run, 0 where nothing is to be moved that way.
        downloaded, uploaded: so far; what is there already counts.
        disk: held on the disk now, or reserved there.
        most_disk: the most that was.
        disk_limit: the bound that the user gave.
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
        """`count` more bytes are here; fewer, where a download has to begin again."""
        with self._lock:
            self.downloaded += count

    def add_uploaded(self, count: int) -> None:
        """`count` more bytes are there."""
        with self._lock:
            self.uploaded += count

    def hold(self, count: int) -> None:
        """The disk holds `count` more bytes, or fewer."""
        with self._lock:
            self.disk += count
            self.most_disk = max(self.most_disk, self.disk)
