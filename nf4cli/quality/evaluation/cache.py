"""Keep a source's log-probabilities on the disk, within a bound.

They are float16, half the size of float32, and are normalised again when they are read. So the
divergence of a model from itself is 3e-7 (SmolLM2-135M, measured).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BYTES = 2
"""Bytes of a log-probability."""


def default_directory() -> Path:
    """Return the directory of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nf4" / "eval"


class Cache:
    """A directory of entries; the oldest ones make room for new ones.

    Args:
        directory: made when something is written.
        most: largest number of bytes of all entries together.
    """

    def __init__(self, directory: Path, most: int) -> None:
        self._directory, self._most = directory, most

    def windows(self, length: int, vocabulary: int) -> int:
        """Return how many windows of `length` positions one entry may hold.

        Raises:
            UsageError: not even one.
        """
        window_bytes = BYTES * length * vocabulary
        if self._most < window_bytes:
            raise UsageError(
                f"--cache-size {self._most:,} bytes is less than one window takes: {length:,} "
                f"positions times {vocabulary:,} tokens are {window_bytes:,}"
            )
        return self._most // window_bytes

    def find(self, key: str) -> NDArray[np.float16] | None:
        """Return an entry of an earlier run, None where there is none.

        Returns:
            float16 [windows, length, vocabulary], a file mapped to memory.
        """
        path = self._path(key)
        try:
            values: NDArray[np.float16] = np.lib.format.open_memmap(path, "r")
        except (OSError, ValueError):
            return None
        os.utime(path)  # the oldest entries are removed first
        return values

    @contextmanager
    def writing(self, key: str, shape: tuple[int, int, int]) -> Iterator[NDArray[np.float16]]:
        """Yield an array to fill, and make it an entry at the end.

        Entries that were not used for the longest time are removed first, as many as it takes.

        Args:
            shape: windows, length, vocabulary.

        Raises:
            OSError: the disk is full or fails.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._make_room(BYTES * shape[0] * shape[1] * shape[2])
        fresh = self._directory / f".{key}.{os.getpid()}.partial"
        try:
            values: Any = np.lib.format.open_memmap(fresh, "w+", np.float16, shape)
            yield values
            values.flush()
            fresh.replace(self._path(key))
        finally:
            fresh.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.npy"

    def _make_room(self, nbytes: int) -> None:
        """Remove the oldest entries until another one of `nbytes` fits."""
        entries = sorted(self._directory.glob("*.npy"), key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in entries) + nbytes
        for path in entries:
            if total <= self._most:
                return
            total -= path.stat().st_size
            with suppress(OSError):
                path.unlink()


def key_of(source: Path, tokens: NDArray[np.int64], settings: dict[str, Any]) -> str:
    """Return the name of an entry: a digest of everything that decides about its values.

    Args:
        source: the model's directory; its files are told apart by name, size and time.
        tokens: int64 [windows, length].
        settings: what else decides, for JSON.
    """
    weights = [p for p in source.rglob("*") if p.suffix in (".safetensors", ".bin", ".json")]
    files = [
        [p.relative_to(source).as_posix(), p.stat().st_size, p.stat().st_mtime_ns]
        for p in sorted(weights)
    ]
    text = json.dumps([str(source.resolve()), files, settings], sort_keys=True)
    return hashlib.sha256(text.encode() + tokens.tobytes()).hexdigest()[:32]
