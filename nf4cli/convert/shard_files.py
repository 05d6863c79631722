"""Write the output's shard files: digest them on the way, and hand each on when it is complete."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import stopping
from ..checkpoint.digest import OrderedDigest, ShardDigest, digest_file, digest_shard, digest_tensor
from ..checkpoint.reader import read_shard
from ..checkpoint.types import FileDigests, Shard
from ..checkpoint.writer import ShardWriter
from ..errors import InterruptedRunError
from ..output.manifest import FileRecord, Result
from ..planning.model_plan import path_in_model
from ..planning.plan import Plan, TensorPlan
from .journal import Journal
from .listener import Listener
from .resume import Standing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ShardFiles:
    """The sink that writes shards; each is finished when its last weight is.

    Weights come in file order, so their bytes are digested on the way; the companions behind
    them are read back when the file is complete.  A shard that an earlier run began is read back
    whole.

    Args:
        plan: says what lies where in each shard.
        directory: of the shards.
        algorithm: of the files' digests.
        journal: told of every weight that is written.
        part: name of this checkpoint in the journal.
        standing: finished work of an earlier run.
        hand_on: told of each file that is complete: its path in the output, where it lies, digest.
        listener: told of weights and files that are finished.

    Attributes:
        shard_digests: of the complete files, by name.
        tensor_digests: of the finished output tensors, by key.
    """

    def __init__(
        self, plan: Plan, directory: Path, algorithm: str, journal: Journal, part: str,
        standing: Standing, hand_on: Callable[[str, Path, str], None], listener: Listener,
    ) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._opening = threading.RLock()
        self._file_of = {key: t.file for t in plan.tensors for key in t.outputs}
        self._pending = [0] * len(plan.shards)
        self._begun = [False] * len(plan.shards)
        for t in plan.tensors:
            done = t.name in standing.results
            self._pending[t.file] += bool(t.outputs) and not done
            self._begun[t.file] |= done
        self._layouts = plan.shards
        self._directory = directory
        self._algorithm = algorithm
        self._journal = journal
        self._part = part
        self._hand_on = hand_on
        self._listener = listener
        self._gone = standing.uploads.keys()
        self._writers: dict[int, ShardWriter] = {}
        self._turns: dict[int, OrderedDigest] = {}
        self._aborted = threading.Event()
        self.shard_digests = dict(standing.shards)
        self.tensor_digests = dict(standing.outputs)

    def open(self) -> None:
        """Open the files that an earlier run began, and finish those that lack no weight.

        Other files are created with their first weight, so that as few as possible lie on the
        disk.  `close` closes what was opened, also where this fails half way.
        """
        for number, pending in enumerate(self._pending):
            name = self._layouts[number].filename
            if name in self._gone:
                continue
            if self._begun[number] or not pending:
                self._writer(number)
            if not pending and name not in self.shard_digests:
                self._finish_shard(number)
            elif not pending:
                self._shard_done(number)

    def _writer(self, number: int) -> ShardWriter:
        """Return the open file of a shard; create it, or open what an earlier run began."""
        with self._opening:
            writer = self._writers.get(number)
            if writer is None:
                layout, begun = self._layouts[number], self._begun[number]
                writer = ShardWriter(self._directory, layout, begun)
                if not begun:
                    digest = ShardDigest(layout.tensors.values(), self._algorithm)
                    digest.update(layout.header)
                    self._turns[number] = OrderedDigest(digest)
                self._writers[number] = writer
                if self._aborted.is_set():
                    self.abort()
            return writer

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Write bytes of an output tensor, and digest them where they come in file order."""
        number = self._file_of[key]
        writer = self._writer(number)
        turns = self._turns.get(number)
        writer.write(key, offset, data)
        if turns is not None and key in writer.layout.streamed:
            turns.update(writer.layout.tensors[key].start + offset, data)

    def finish(self, plan: TensorPlan, result: Result) -> None:
        """Journal a weight that is written, and finish its file when it is the last one in it."""
        writer = self._writer(plan.file)
        digests = {key: self._digest_of(writer, plan.file, key) for key in plan.outputs}
        self._listener.tensor(self._part, plan, result)
        with self._lock:
            self.tensor_digests |= digests
            self._pending[plan.file] -= 1
            last = not self._pending[plan.file]
        if all(source.stored.name in result.sources for source in plan.weight.sources):
            self._journal.weight(self._part, plan.name, result, digests, writer.path)
        if last:
            self._finish_shard(plan.file)

    def source_read(self, shard: Shard, digests: FileDigests) -> None:
        """Journal a source file that is read to its end."""
        self._journal.source_file(self._part, shard.path.name, digests)

    def abort(self) -> None:
        """Release every thread that waits in `write`."""
        self._aborted.set()
        for turns in list(self._turns.values()):
            turns.abort()

    def close(self) -> None:
        """Close every file that is open."""
        for writer in self._writers.values():
            writer.close()

    def _digest_of(self, writer: ShardWriter, number: int, key: str) -> str:
        """Return the digest of a finished output tensor, read back where it was not streamed."""
        turns = self._turns.get(number)
        if turns is not None and key in turns.digest.tensors:
            return turns.digest.tensors[key]
        return digest_tensor(writer.reader(), writer.layout.tensors[key])

    def _finish_shard(self, number: int) -> None:
        """Digest what was not digested on the way, check the header, and hand the file on.

        Raises:
            InterruptedRunError: the run was aborted. Bytes may then be missing from the digest, and
                a file that is handed on is never looked at again.
        """
        writer, turns = self._writers[number], self._turns.get(number)
        if turns is not None:
            for piece in writer.tail():
                turns.digest.update(piece)
            digest = turns.digest.hexdigest()
            self._stop_when_aborted(0)
        else:
            shard = read_shard(writer.path)
            digest, _ = digest_shard(shard, self._algorithm, self._stop_when_aborted)
        writer.finish()
        self.shard_digests[writer.path.name] = digest
        self._shard_done(number)

    def _shard_done(self, number: int) -> None:
        """Hand a complete file on."""
        layout, writer = self._layouts[number], self._writers[number]
        self._listener.file(self._part, layout.filename, layout.size)
        writer.close()
        name = path_in_model(self._part, layout.filename)
        self._hand_on(name, writer.path, self.shard_digests[layout.filename])

    def _stop_when_aborted(self, count: int) -> None:
        if self._aborted.is_set():
            raise InterruptedRunError("interrupted")
        stopping.check()


def file_records(
    directory: Path, algorithm: str, known: Mapping[str, FileRecord]
) -> dict[str, FileRecord]:
    """Return size and digest of every file of a finished directory, by its path in it.

    Args:
        known: records of files that need not be read again, or that were taken away.
    """
    files = dict(known)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in known:
            files[name] = FileRecord(path.stat().st_size, digest_file(path, algorithm))
    return files
