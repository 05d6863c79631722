"""Publish the files of an output as one commit of a model's repository.

Each file is uploaded as soon as it exists, without a commit; the commit at the end names them all,
so nobody sees a half of it.  The Hub keeps what was uploaded and not committed, so the next run
need not send it again.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..callbacks import Notify, no_notice
from ..checkpoint.discovery import CARD, MANIFEST
from ..checkpoint.file_io import Identity
from ..checkpoint.model_files import never_kind
from ..checkpoint.untrusted import read_start
from ..errors import InputError, MachineError, UsageError
from ..output.card import addressed
from .client import Name, Snapshot, resolve
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
from .retries import Retries
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

_ATTEMPTS = 6
_LONGEST_WAIT = 300.0  # seconds that a server may ask for
_SAMPLE = 512  # bytes of a file's start that the Hub looks at
Answer = TypeVar("Answer")


def _tell_nobody(count: int) -> None:
    """Take a number of bytes that were sent, and do nothing."""


class LostUploadError(MachineError):
    """The Hub no longer has bytes that an earlier run sent to it.

    Attributes:
        names: the files that the Hub names; where it names none, all that were restored.
    """

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file that was added to a publication.

    Attributes:
        name: path in the repository, with slashes.
        size: bytes.
        sha256: of its bytes, hexadecimal.
        sample: its first 512 bytes.
        stored: whether the Hub holds its bytes, so that another process can `restore` it.  False
            for a small file, which waits in memory and is sent with the commit itself.
    """

    name: str
    size: int
    sha256: str
    sample: bytes
    stored: bool


@dataclass(frozen=True, slots=True)
class Published:
    """An output in a repository.

    Attributes:
        repo: `org/name`.
        commit: 40 hexadecimal digits.
        url: of the model's page.
        private: whether only those with access see it.
        changed: False where the repository held all of it before, and no commit was made.
        deleted: files of an earlier output that the commit deleted.
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
        public: whether a repository that does not exist yet is created public.  One that exists
            stays as it is.
        replace_card: whether a README.md in the repository is replaced.
        notify: told what the user should know.
        sent: told the bytes that are uploaded; bytes that the Hub has already count as well.

    Attributes:
        repo: `org/name`, after `prepare`.
        private: whether the repository is private, after `prepare`.
        replaces_card: `replace_card`.
        keeps_card: whether the repository has a README.md that stays: `add` then leaves ours out.
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

    @classmethod
    def joined(cls, repo: str, head: Snapshot, sent: Sent) -> Publication:
        """Return a publication that only adds files, for another process to commit.

        Args:
            head: the repository's commit when that process looked at it.
        """
        joined = cls(repo, sent=sent)
        joined._head = head
        return joined

    @property
    def head(self) -> Snapshot:
        """The repository's commit when `prepare` looked at it."""
        assert self._head is not None, "prepare() comes first"
        return self._head

    def require_write_access(self) -> None:
        """Ask whether files may be sent to the repository, which exists.

        Raises:
            InputError: no token, or one that may not write there.
            MachineError: the Hub cannot be reached.
        """
        require_access(self.repo)
        try:
            self._ask(self.repo, self._probe)
        except InputError as error:
            raise no_access(self.repo, error) from error

    def prepare(self) -> None:
        """Create the repository where there is none, and check everything that may refuse a commit.

        Raises:
            UsageError: the repository holds another model, HF_HUB_OFFLINE is set, or `repo` is no
                valid name.
            InputError: no token, or one that may not write there.
            MachineError: the Hub cannot be reached.
        """
        require_access(self.repo)
        try:
            self.repo = self._ask(self.repo, self._create)
        except InputError as error:
            raise no_access(self.repo, error) from error
        self.require_write_access()
        head = self._ask(self.repo, lambda: resolve(Name(self.repo, None)))
        self._recorded, why = files_of_earlier_output(
            head, lambda name: self._ask(f"{name} of {self.repo}", lambda: read_whole(head, name))
        )
        refuse_another_model(self.repo, head, self._recorded, why)
        self.keeps_card = CARD in head.files and not self.replaces_card
        self._head = head
        if self.keeps_card:
            self._notify(f"{self.repo} keeps its {CARD}; --replace-card puts ours there")
        self._say_who_sees_it()

    def _create(self) -> str:
        """Create the repository unless it exists, and return its name with the owner."""
        from huggingface_hub import HfApi

        url = HfApi().create_repo(self.repo, private=not self._public, exist_ok=True)
        if "/" in url.repo_id:
            return str(url.repo_id)
        return f"{HfApi().whoami()['name']}/{url.repo_id}"

    def _probe(self) -> None:
        """Ask how a file would be uploaded: that needs the right to write, and sends nothing."""
        from huggingface_hub import CommitOperationAdd, HfApi

        HfApi().preupload_lfs_files(self.repo, [CommitOperationAdd(MANIFEST, b"{}")])

    def _say_who_sees_it(self) -> None:
        """Note whether the repository is private, and tell the user where that is unexpected."""
        from huggingface_hub import HfApi

        self.private = self._ask(self.repo, lambda: bool(HfApi().model_info(self.repo).private))
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
        """Upload the bytes of a file, which may be removed afterwards.

        Bytes that the Hub has are not sent: the same file under this name, or the same bytes that
        an earlier run sent.

        Args:
            path: a regular file, which nobody writes to meanwhile.
            name: path in the repository, with slashes.
            sha256: of its bytes; None where the caller does not know it.
            identity: of the file that `sha256` was computed of; None for the file as it is now.

        Raises:
            InputError: the file changed meanwhile, is one that is never published, or the Hub
                refuses it.
            UsageError: the repository's .gitignore would leave it out.
            MachineError: the Hub cannot be reached, or says again and again that it is busy.
        """
        if name == CARD:
            return self._add_card(path)
        if kind := never_kind(name):
            raise InputError(f"{path} is one of the {kind}, which are never published: remove it")
        sample, size, identity_now = read_start(path, _SAMPLE)
        identity = identity or identity_now
        if identity_now != identity:
            raise _changed(path)
        if sha256 is None:
            sha256 = sha256_of(path)
        if self._is_there(name, size, sha256):
            self._expect(name, Expected(size, sha256, None))
            self._sent(size)
            return Uploaded(name, size, sha256, sample, True)
        operation = addition(name, path, size, sample, sha256, self._sent)
        try:
            self._ask(f"{name} for {self.repo}", lambda: self._send(operation))
        except (InputError, MachineError) as error:
            if read_start(path, 0)[2] != identity:
                raise _changed(path) from error
            raise
        stored = is_stored(operation)
        blob = None if stored else hold(operation, path, sha256)
        if read_start(path, 0)[2] != identity:
            raise _changed(path)
        self._expect(name, Expected(size, sha256, blob), operation)
        counter_of(operation)(size)  # where the Hub had the bytes, none were read and counted
        return Uploaded(name, size, sha256, sample, stored)

    def _add_card(self, path: Path) -> Uploaded:
        """Add the model card, with the repository's name, unless the repository keeps its own.

        Raises:
            InputError: it is too large, or see `add`.
        """
        from huggingface_hub import CommitOperationAdd

        data, size, _ = read_start(path, MAX_IN_GIT)
        if size > MAX_IN_GIT:
            raise InputError(f"{path} has {size:,} bytes: no model card does")
        text = addressed(data, self.repo)
        sha256 = hashlib.sha256(text).hexdigest()
        if not self.keeps_card:
            operation = CommitOperationAdd(CARD, text)
            self._ask(f"{CARD} for {self.repo}", lambda: self._send(operation))
            blob = None if is_stored(operation) else blob_of(text)
            self._expect(CARD, Expected(len(text), sha256, blob), operation)
        self._sent(size)
        return Uploaded(CARD, len(text), sha256, text[:_SAMPLE], False)

    def restore(self, uploaded: Uploaded) -> None:
        """Add a file that an earlier run uploaded, and that this disk may not have any more."""
        self.accept(uploaded)
        if not self._is_there(uploaded.name, uploaded.size, uploaded.sha256):
            self._restored.add(uploaded.name)
        self._sent(uploaded.size)

    def accept(self, uploaded: Uploaded) -> None:
        """Add a file that another process uploaded, and counted."""
        operation = None
        if not self._is_there(uploaded.name, uploaded.size, uploaded.sha256):
            operation = addition(
                uploaded.name, None, uploaded.size, uploaded.sample, uploaded.sha256, self._sent
            )
        self._expect(uploaded.name, Expected(uploaded.size, uploaded.sha256, None), operation)

    def has(self, name: str) -> bool:
        """Return whether a file was added or restored."""
        return name in self._expected

    @property
    def restored(self) -> tuple[str, ...]:
        """Names of the files that only an earlier process uploaded, sorted."""
        return tuple(sorted(self._restored))

    def _is_there(self, name: str, size: int, sha256: str) -> bool:
        """Return whether the repository has this file already."""
        file = self.head.files.get(name)
        return file is not None and (file.size, file.sha256) == (size, sha256)

    def _expect(
        self, name: str, expected: Expected, operation: CommitOperationAdd | None = None
    ) -> None:
        """Note a file that the commit has to show, and the operation that puts it there."""
        file = self.head.files.get(name)
        with self._lock:
            self._expected[name] = expected
            if operation is None or (file and expected.blob and file.blob == expected.blob):
                return  # the repository has it already
            self._operations.append(operation)

    def _send(self, operation: CommitOperationAdd) -> None:
        """Upload the bytes of one file, unless it is small.

        Raises:
            UsageError: the repository's .gitignore would leave it out.
        """
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
        """Files of the earlier output that the new one does not have; never the model card."""
        earlier = self.head.files.keys() & self._recorded
        return tuple(sorted(earlier - self._expected.keys() - {CARD, ".gitattributes"}))

    def commit(self, message: str) -> Published:
        """Make everything that was added visible at once, and check that the Hub shows it.

        Raises:
            MachineError: somebody else made a commit meanwhile, the Hub cannot be reached, or it
                shows something else.  What was uploaded stays there for the next run.
            LostUploadError: the Hub no longer has what an earlier run uploaded.
            InputError: the Hub refuses it, for example for the metadata of README.md.
        """
        with self._lock:
            operations, stale = list(self._operations), self.stale
        commit = self._commit_persistently(operations, stale, message)
        shown = self._ask(self.repo, lambda: resolve(Name(self.repo, commit)))
        if wrong := differences(shown, self._expected, stale):
            raise MachineError(
                f"commit {commit[:12]} of {self.repo} is not what was sent: {wrong[0]}. Run the "
                "same again, and look at the page of the model"
            )
        changed = commit != self.head.commit
        url = f"{endpoint()}/{self.repo}"
        return Published(self.repo, commit, url, self.private, changed, stale)

    def _commit_persistently(
        self, operations: list[CommitOperationAdd], stale: tuple[str, ...], message: str
    ) -> str:
        """Send a commit until the Hub has it, and return its id; raises what `commit` does."""
        retries = Retries(self._notify, attempts=_ATTEMPTS)
        while True:
            try:
                return self._send_commit(operations, stale, message)
            except LostUploadError:
                raise  # the Hub has answered: no further attempt brings them back
            except MachineError as error:
                # The commit may have been made although its answer was lost.
                now = self._ask(self.repo, lambda: resolve(Name(self.repo, None)))
                if now.commit != self.head.commit:
                    if not differences(now, self._expected, stale):
                        return now.commit
                    raise MachineError(
                        f"{self.repo} got another commit ({now.commit[:12]}) since this run "
                        "looked at it; nothing of it was changed, and what was sent stays there: "
                        "run the same again"
                    ) from error
                if _is_conflict(error):
                    raise
                retries.failed(error, at_least=retry_after(error, _LONGEST_WAIT))

    def _send_commit(
        self, operations: list[CommitOperationAdd], stale: tuple[str, ...], message: str
    ) -> str:
        """Send a commit once, and return its id, or the head's where there is nothing to change.

        Raises:
            LostUploadError: the Hub no longer has what an earlier run uploaded.
            InputError, UsageError, MachineError: see `translated`.
        """
        from huggingface_hub import CommitOperationDelete, HfApi

        head = self.head.commit
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

    def _ask(self, what: str, call: Callable[[], Answer]) -> Answer:
        """Return what the Hub answers to `call`, sent again after a MachineError.

        Args:
            what: is asked for, for messages.

        Raises:
            InputError, UsageError, MachineError: see `translated`.
        """
        retries = Retries(self._notify, attempts=_ATTEMPTS)
        while True:
            try:
                with translated(what):
                    return call()
            except MachineError as error:
                retries.failed(error, at_least=retry_after(error, _LONGEST_WAIT))


def _changed(path: Path) -> InputError:
    """Return the error about a file that changed while it was sent."""
    return InputError(
        f"{path} changed while it was sent, and nothing was published: let nobody write there, "
        "see that it is good (nf4 verify), and run the same again"
    )


def _is_conflict(error: MachineError) -> bool:
    """Return whether the Hub says that its head is no longer the one that the commit names."""
    response = response_of(error)
    return response is not None and response.status_code == 412


def _lost(error: InputError, restored: Collection[str]) -> tuple[str, ...]:
    """Return the files that the Hub lacks, where it refuses a commit for that; () otherwise.

    Args:
        restored: names of the files that an earlier process uploaded.
    """
    text = f"{error} {error.__cause__}"
    if not restored or not re.search(r"\blfs\b|pointer", text, re.IGNORECASE):
        return ()
    named = sorted(name for name in restored if name in text)
    return tuple(named or sorted(restored))
