"""Files of an output -> one commit of a model's repository, which nobody sees half of.

Bytes go up file by file, as soon as there is a file, without a commit; the commit at the end names
them all.  The Hub keeps what was sent and not committed, so that the next run need not send it.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..callbacks import Notify, no_notice
from ..checkpoint.discovery import CARD, MANIFEST
from ..checkpoint.file_io import Identity
from ..checkpoint.untrusted import read_start
from ..errors import InputError, MachineError, UsageError
from ..output.card import addressed
from .client import Name, Snapshot, resolve, waits
from .errors import endpoint
from .repository import (
    Expected,
    differences,
    files_of_earlier_output,
    no_access,
    read_whole,
    refuse_another_model,
    require_access,
)
from .upload import (
    MAX_IN_GIT,
    Sent,
    addition,
    blob_of,
    counter_of,
    hold,
    is_ignored,
    is_stored,
    response_of,
    retry_after,
    sha256_of,
    translated,
)
from .xet_progress import reporting

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_RETRIES = 5  # of what fails for a reason that may pass
_LONGEST_WAIT = 300.0  # that a server may ask for
_SAMPLE = 512  # bytes of a file's start that the Hub looks at
Answer = TypeVar("Answer")


def _tell_nobody(count: int) -> None:
    pass


class LostUploadError(MachineError):
    """The Hub does not have bytes any more that an earlier run sent to it.

    Attributes:
        names: the files that have to be sent again, where it says so; else all that were restored.
    """

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file that was handed over.

    Attributes:
        name: path in the repository, with slashes.
        size: bytes.
        sha256: of its bytes, hexadecimal.
        sample: its first 512 bytes.
        stored: the Hub holds its bytes, so that another process can go on with `restore`.  False
            for a small file, which waits in memory and goes up with the commit itself.
    """

    name: str
    size: int
    sha256: str
    sample: bytes
    stored: bool


@dataclass(frozen=True, slots=True)
class Published:
    """Attributes:
    repo: with its owner.
    commit: 40 hexadecimal digits.
    url: of the model's page.
    private: whether only its owner sees it.
    changed: False where the repository held all of it before, and no commit was made.
    deleted: files of an earlier output that are gone.
    """

    repo: str
    commit: str
    url: str
    private: bool
    changed: bool
    deleted: tuple[str, ...]


class Publication:
    """One commit in the making: `prepare`, then `add` and `restore` in any order, then `commit`.

    `add` may be called from several threads at a time.

    Args:
        repo: `org/name`, or `name` for the user's own.
        public: whether a repository that does not exist yet is made for everybody to see.  One
            that exists stays as it is.
        replace_card: whether a README.md that is there is replaced.
        sent: told of bytes as they go up; what was there already counts.

    Attributes:
        repo: with its owner, after `prepare`.
        private: after `prepare`.
        replaces_card: as given.
        keeps_card: the repository has a README.md, which stays: `add` leaves ours out.
    """

    def __init__(
        self,
        repo: str,
        public: bool = False,
        replace_card: bool = False,
        notify: Notify = no_notice,
        sent: Sent = _tell_nobody,
    ) -> None:
        self.repo = repo
        self.private = not public
        self.keeps_card = False
        self._public = public
        self.replaces_card = replace_card
        self._notify = notify
        self._sent = sent
        self._lock = threading.Lock()
        self._head: Snapshot | None = None
        self._recorded: frozenset[str] = frozenset()
        self._operations: list[CommitOperationAdd] = []
        self._expected: dict[str, Expected] = {}
        self._restored: set[str] = set()

    def prepare(self) -> None:
        """Have the repository, and everything that could refuse the commit looked at.

        Raises:
            UsageError: another model lives there; HF_HUB_OFFLINE is set; no name of a Hub's.
            InputError: no token, or one that may not write there.
            MachineError: the Hub cannot be reached.
        """
        require_access(self.repo)
        try:
            self.repo = self._asked(self.repo, self._create)
            self._asked(self.repo, self._probe)
        except InputError as error:
            raise no_access(self.repo, error) from error
        head = self._asked(self.repo, lambda: resolve(Name(self.repo, None)))
        self._recorded, why = files_of_earlier_output(
            head, lambda name: self._asked(f"{name} of {self.repo}", lambda: read_whole(head, name))
        )
        refuse_another_model(self.repo, head, self._recorded, why)
        self.keeps_card = CARD in head.files and not self.replaces_card
        self._head = head
        if self.keeps_card:
            self._notify(f"{self.repo} keeps its {CARD}; --replace-card puts ours there")
        self._say_who_sees_it()

    def _create(self) -> str:
        from huggingface_hub import HfApi

        url = HfApi().create_repo(self.repo, private=not self._public, exist_ok=True)
        if "/" in url.repo_id:
            return str(url.repo_id)
        return f"{HfApi().whoami()['name']}/{url.repo_id}"

    def _probe(self) -> None:
        """Ask how a file would go up, which needs the right to write, and sends nothing."""
        from huggingface_hub import CommitOperationAdd, HfApi

        HfApi().preupload_lfs_files(self.repo, [CommitOperationAdd(MANIFEST, b"{}")])

    def _say_who_sees_it(self) -> None:
        from huggingface_hub import HfApi

        self.private = self._asked(self.repo, lambda: bool(HfApi().model_info(self.repo).private))
        if self.private and self._public:
            self._notify(
                f"{self.repo} exists and is private, and stays so: make it public in its settings"
            )
        elif not self.private and not self._public:
            self._notify(f"{self.repo} exists and is public: everybody will see what is pushed")

    def add(
        self,
        path: Path,
        name: str,
        sha256: str | None = None,
        identity: Identity | None = None,
    ) -> Uploaded:
        """Send the bytes of a file; it may be removed afterwards.

        What the Hub has is not sent: the same file under this name, or the same bytes that an
        earlier run sent.

        Args:
            path: a regular file, which nobody writes to meanwhile.
            name: path in the repository, with slashes.
            sha256: of its bytes, where the caller knows it.
            identity: which file that was the digest of.

        Raises:
            InputError: the file changed meanwhile, or the Hub refuses it.
            UsageError: the repository's .gitignore would leave it out.
            MachineError: the Hub cannot be reached, or says again and again that it is busy.
        """
        if name == CARD:
            return self._add_card(path)
        sample, size, found = read_start(path, _SAMPLE)
        identity = identity or found
        if found != identity:
            raise _changed(path)
        if sha256 is None:
            sha256 = sha256_of(path)
        if self._is_there(name, size, sha256):
            self._expect(name, Expected(size, sha256, None))
            self._sent(size)
            return Uploaded(name, size, sha256, sample, True)
        operation = addition(name, path, size, sample, sha256, self._sent)
        try:
            self._asked(f"{name} for {self.repo}", lambda: self._send(operation))
        except (InputError, MachineError) as error:
            if read_start(path, 0)[2] != identity:
                raise _changed(path) from error
            raise
        stored = is_stored(operation)
        blob = None if stored else hold(operation, path, sha256)
        if read_start(path, 0)[2] != identity:
            raise _changed(path)
        self._expect(name, Expected(size, sha256, blob), operation)
        counter_of(operation)(size)  # the Hub may have had it, and read nothing
        return Uploaded(name, size, sha256, sample, stored)

    def _add_card(self, path: Path) -> Uploaded:
        """The model card, with the name of the repository in it, unless one is there that stays."""
        from huggingface_hub import CommitOperationAdd

        data, size, _ = read_start(path, MAX_IN_GIT)
        if size > MAX_IN_GIT:
            raise InputError(f"{path} has {size:,} bytes: no model card does")
        text = addressed(data, self.repo)
        sha256 = hashlib.sha256(text).hexdigest()
        if not self.keeps_card:
            operation = CommitOperationAdd(CARD, text)
            self._asked(f"{CARD} for {self.repo}", lambda: self._send(operation))
            blob = None if is_stored(operation) else blob_of(text)
            self._expect(CARD, Expected(len(text), sha256, blob), operation)
        self._sent(size)
        return Uploaded(CARD, len(text), sha256, text[:_SAMPLE], False)

    def restore(self, uploaded: Uploaded) -> None:
        """Count a file in that an earlier process sent, and that is not on this disk any more."""
        if not self._is_there(uploaded.name, uploaded.size, uploaded.sha256):
            operation = addition(
                uploaded.name, None, uploaded.size, uploaded.sample, uploaded.sha256, self._sent
            )
            self._expect(uploaded.name, Expected(uploaded.size, uploaded.sha256, None), operation)
            self._restored.add(uploaded.name)
        else:
            self._expect(uploaded.name, Expected(uploaded.size, uploaded.sha256, None))
        self._sent(uploaded.size)

    def has(self, name: str) -> bool:
        """Whether a file was added or restored."""
        return name in self._expected

    @property
    def restored(self) -> tuple[str, ...]:
        """Names of files that only an earlier process sent, sorted."""
        return tuple(sorted(self._restored))

    def _is_there(self, name: str, size: int, sha256: str) -> bool:
        there = self._prepared.files.get(name)
        return there is not None and (there.size, there.sha256) == (size, sha256)

    @property
    def _prepared(self) -> Snapshot:
        assert self._head is not None, "prepare() comes first"
        return self._head

    def _expect(
        self, name: str, expected: Expected, operation: CommitOperationAdd | None = None
    ) -> None:
        there = self._prepared.files.get(name)
        with self._lock:
            self._expected[name] = expected
            if operation is None or (there and expected.blob and there.blob == expected.blob):
                return  # it is there as it should be
            self._operations.append(operation)

    def _send(self, operation: CommitOperationAdd) -> None:
        from huggingface_hub import HfApi

        with reporting(counter_of(operation)):
            HfApi().preupload_lfs_files(self.repo, [operation], num_threads=1, free_memory=False)
        if is_ignored(operation):
            raise UsageError(
                f"the .gitignore of {self.repo} leaves {operation.path_in_repo} out, so that the "
                "model would not be whole: remove that line from it"
            )

    @property
    def stale(self) -> tuple[str, ...]:
        """Files of the earlier output that the new one does not have; its card stays."""
        here = self._prepared.files.keys() & self._recorded
        return tuple(sorted(here - self._expected.keys() - {CARD, ".gitattributes"}))

    def commit(self, message: str) -> Published:
        """Make what was added visible, all at once, and see that it is.

        Raises:
            MachineError: somebody else made a commit meanwhile, the Hub cannot be reached, or what
                it shows is not what was sent.  What was sent stays there for the next run.
            LostUploadError: the Hub does not have what an earlier run sent.
            InputError: the Hub refuses it; README.md's metadata is not what it takes.
        """
        with self._lock:
            operations, stale = list(self._operations), self.stale
        for wait in (*waits(_RETRIES), None):
            try:
                commit = self._send_commit(operations, stale, message)
                break
            except LostUploadError:
                raise  # the Hub has answered: no further attempt brings them back
            except MachineError as error:
                # The commit may have been made although its answer was lost.
                now = self._asked(self.repo, lambda: resolve(Name(self.repo, None)))
                if now.commit != self._prepared.commit:
                    if not differences(now, self._expected, stale):
                        commit = now.commit
                        break
                    raise MachineError(
                        f"{self.repo} got another commit ({now.commit[:12]}) since this run "
                        "looked at it; nothing of it was changed, and what was sent stays there: "
                        "run the same again"
                    ) from error
                if wait is None or _is_conflict(error):
                    raise
                self._wait(error, wait)
        shown = self._asked(self.repo, lambda: resolve(Name(self.repo, commit)))
        if wrong := differences(shown, self._expected, stale):
            raise MachineError(
                f"commit {commit[:12]} of {self.repo} is not what was sent: {wrong[0]}. Run the "
                "same again, and look at the page of the model"
            )
        changed = commit != self._prepared.commit
        url = f"{endpoint()}/{self.repo}"
        return Published(self.repo, commit, url, self.private, changed, stale)

    def _send_commit(
        self, operations: list[CommitOperationAdd], stale: tuple[str, ...], message: str
    ) -> str:
        """One attempt; the id of the commit, or of the head where there is nothing to change."""
        from huggingface_hub import CommitOperationDelete, HfApi

        head = self._prepared.commit
        if not operations and not stale:
            return head
        try:
            with translated(self.repo):
                answer = HfApi().create_commit(
                    self.repo,
                    [*operations, *(CommitOperationDelete(name) for name in stale)],
                    commit_message=message,
                    parent_commit=head,
                )
        except InputError as error:
            if lost := _lost(error, self._restored):
                raise LostUploadError(
                    f"{endpoint()} no longer has {', '.join(lost[:3])}"
                    f"{', ...' if lost[3:] else ''}, which an earlier run sent: those files have "
                    f"to be made and sent again ({error})",
                    lost,
                ) from error
            raise
        return str(answer.oid)

    def _asked(self, what: str, call: Callable[[], Answer]) -> Answer:
        """What the Hub answers, asked again while the machine or the network may be to blame."""
        for wait in waits(_RETRIES):
            try:
                with translated(what):
                    return call()
            except MachineError as error:
                self._wait(error, wait)
        with translated(what):
            return call()

    def _wait(self, error: MachineError, seconds: float) -> None:
        seconds = max(seconds, retry_after(error, _LONGEST_WAIT))
        self._notify(f"{error}; the next attempt is in {seconds:.0f} s")
        time.sleep(seconds)


def _changed(path: Path) -> InputError:
    return InputError(
        f"{path} changed while it was sent, and nothing was published: let nobody write there, "
        "see that it is good (nf4 verify), and run the same again"
    )


def _is_conflict(error: MachineError) -> bool:
    """Whether the Hub says that its head is another than the one that we named."""
    response = response_of(error)
    return response is not None and response.status_code == 412


def _lost(error: InputError, restored: Collection[str]) -> tuple[str, ...]:
    """Files of an earlier process that the Hub says it does not have, when it refuses a commit."""
    text = f"{error} {error.__cause__}"
    if not restored or not re.search(r"\blfs\b|pointer", text, re.IGNORECASE):
        return ()
    named = sorted(name for name in restored if name in text)
    return tuple(named or sorted(restored))
