"""Repositories: commits of files, which lie on the disk by their SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

LFS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".model", ".png")
LARGE = 10_000_000  # bytes: what is larger is LFS whatever its name is


@dataclass(frozen=True)
class File:
    """Attributes:
    place: where its bytes are.
    sha256: of an LFS file; `blob` is then that of its pointer.
    """

    place: Path
    size: int
    sha256: str | None
    blob: str

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass
class Repo:
    """Attributes:
    commits: files by name, by commit.
    branches: commit by name; tags are the same.
    """

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.commits:
            self.commit({}, "initial commit")

    def commit(self, files: dict[str, File], message: str, branch: str = "main") -> str:
        text = "".join(f"{name}{files[name].etag}" for name in sorted(files))
        parent = self.branches.get(branch, "")
        sha = hashlib.sha1(f"{parent}{message}{text}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, or a commit itself."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def head(self) -> dict[str, File]:
        return self.commits[self.branches["main"]]


class Store:
    """Args:
    root: for objects.
    """

    def __init__(self, root: Path) -> None:
        self.objects = root / "objects"
        self.objects.mkdir(parents=True)
        self.repos: dict[str, Repo] = {}

    def object(self, sha256: str) -> Path:
        return self.objects / sha256

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.object(sha256).write_bytes(data)
        return sha256

    def file(self, name: str, source: bytes | Path, sha256: str | None = None) -> File:
        """A file as a repository holds it.

        Args:
            source: its bytes, or where they lie (a large file is not copied).
            sha256: where it is known, or should be stated wrongly.
        """
        if isinstance(source, bytes):
            source = self.object(self.put(source))
        size = source.stat().st_size
        if name.endswith(LFS) or size > LARGE:
            sha256 = sha256 or sha256_of(source)
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
            )
            return File(source, size, sha256, git_digest(pointer.encode()))
        return File(source, size, None, git_digest(source.read_bytes()))

    def add(self, name: str, source: Path | dict[str, bytes | Path], **options: bool) -> Repo:
        """A repository of a directory's files, or of given ones."""
        if isinstance(source, Path):
            paths = sorted(p for p in source.rglob("*") if p.is_file())
            source = {p.relative_to(source).as_posix(): p for p in paths}
        repo = self.repos[name] = Repo(name, **options)
        repo.commit({n: self.file(n, s) for n, s in source.items()}, "files")
        return repo

    def clear(self) -> None:
        shutil.rmtree(self.objects)


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file's bytes; of one that is mostly hole, of its size: nobody reads all of that."""
    status = path.stat()
    if 512 * status.st_blocks < status.st_size // 2:
        return hashlib.sha256(str(status.st_size).encode()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def is_lfs(name: str, size: int) -> bool:
    return name.endswith(LFS) or size > LARGE


def environment_of(url: str, home: Path, token: str | None) -> dict[str, str]:
    """The environment of a process that speaks to a server and to nothing else."""
    left = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    return {
        **left,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # LFS: the other way there is
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NF4_HUB_WAIT": "0.1",
        "NO_PROXY": "*",
        **({} if token is None else {"HF_TOKEN": token}),
    }
