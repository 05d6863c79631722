"""What a repository holds after an output was pushed to it."""

from __future__ import annotations

from pathlib import Path

from . import Hub

REPO = "me/model-nf4"


def require_published(hub: Hub, output: Path, commits: int = 2) -> None:
    """The head of the repository is the output, made in one commit."""
    repo = hub.store.repos[REPO]
    assert len(repo.commits) == commits
    names = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert repo.head.keys() == names
    for name in names - {"README.md"}:
        assert repo.head[name].place.read_bytes() == (output / name).read_bytes()
