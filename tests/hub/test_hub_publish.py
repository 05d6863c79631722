"""The library that publishes, with both ends of the range of huggingface_hub."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Fault, Hub

from nf4cli.hub.client import Name, RemoteFile, Snapshot
from nf4cli.hub.repository import Expected, differences

WORKER = Path(__file__).parent.parent / "publish_worker.py"
OLD = os.environ.get("NF4_TRANSFORMERS4_PYTHON", "")


@pytest.fixture(params=["new", "old"])
def python(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(an interpreter, what its PYTHONPATH has to be): huggingface_hub 2.x, and 0.36."""
    if request.param == "new":
        return sys.executable, ""
    if not OLD:
        pytest.skip("NF4_TRANSFORMERS4_PYTHON names no interpreter with huggingface_hub below 1.0")
    package = importlib.util.find_spec("nf4cli")
    assert package is not None
    (tmp_path / "only-nf4cli").mkdir()
    (tmp_path / "only-nf4cli" / "nf4cli").symlink_to(Path(package.origin or "").parent)
    return OLD, str(tmp_path / "only-nf4cli")


@pytest.fixture
def worker(python, tmp_path):
    """Runs a step of the worker against a Hub; returns (its document, its process)."""

    def run(
        hub: Hub, step: str, directory: Path, stdin: str = "", code: int = 0, xet: bool = False
    ):
        done = subprocess.run(
            [python[0], WORKER, step, directory, "me/made"], input=stdin, text=True,
            env={**hub.environment(tmp_path / "home", xet=xet), "PYTHONPATH": python[1]},
            capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return (json.loads(done.stdout) if done.stdout else {}), done

    return run


@pytest.fixture
def files(tmp_path):
    place = tmp_path / "files"
    place.mkdir()
    (place / "model-00001-of-00002.safetensors").write_bytes(b"a" * 300_000)
    (place / "model-00002-of-00002.safetensors").write_bytes(b"b" * 200_000)
    (place / "config.json").write_text("{}")
    (place / "README.md").write_text("---\nlicense: mit\n---\nyour-name/this-model\n")
    return place


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_second_process_commits_what_the_first_one_sent(worker, python, files, tmp_path, xet):
    with Hub(tmp_path / "hub") as hub:
        first, _ = worker(hub, "send", files, xet=xet)
        assert bool(hub.requests("POST /v1/xorbs")) is xet
        assert first["client"].startswith("0." if python[0] == OLD else "2.")
        assert {u["name"] for u in first["sent"] if u["stored"]} == {
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        }  # fmt: skip
        repo = hub.store.repos["me/made"]
        assert repo.head == {}
        for path in files.glob("*.safetensors"):
            path.unlink()
        hub.log.clear()
        second, _ = worker(hub, "commit", files, json.dumps(first), xet=xet)
        assert second["changed"]
        assert second["commit"] == repo.branches["main"]
        assert not hub.requests("PUT /upload|POST /v1/xorbs"), "sent again"
        assert len(repo.commits) == 2
        assert repo.head["model-00002-of-00002.safetensors"].place.read_bytes() == b"b" * 200_000
        assert repo.head["README.md"].place.read_text().endswith("me/made\n")


def test_what_the_hub_lost_is_named(worker, files, tmp_path):
    with Hub(tmp_path / "hub") as hub:
        first, _ = worker(hub, "send", files)
        lost = next(u for u in first["sent"] if u["name"].startswith("model-00002"))
        hub.store.object(lost["sha256"]).unlink()
        for path in files.glob("*.safetensors"):
            path.unlink()
        _, done = worker(hub, "commit", files, json.dumps(first), code=1)
        assert "LostUploadError" in done.stderr
        assert "no longer has model-00002-of-00002.safetensors" in done.stderr
        assert "00001" not in done.stderr.split("no longer has")[-1].split(", which")[0]
        assert hub.store.repos["me/made"].head == {}


FAULTS = {
    "too many requests": Fault(r"POST .*objects/batch", status=429, headers={"Retry-After": "1"}),
    "an upload that breaks": Fault(r"PUT /upload", drop=True),
    "a commit whose answer is lost": Fault(r"POST .*/commit/main", lose=True),
    "a card that cannot be looked at": Fault(r"POST /api/validate-yaml", status=503),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes(worker, files, tmp_path, name):
    with Hub(tmp_path / "hub") as hub:
        hub.faults.add(Fault(**vars(FAULTS[name])))
        worker(hub, "commit", files, '{"sent": []}')
        assert hub.faults.seen
        repo = hub.store.repos["me/made"]
        assert len(repo.commits) == 2
        assert sorted(repo.head) == sorted(p.name for p in files.iterdir())


def snapshot(**files: RemoteFile) -> Snapshot:
    return Snapshot(Name("me/made", None), "0" * 40, files)


def test_a_commit_that_shows_something_else_is_noticed():
    large, small = Expected(9, "s", None), Expected(3, "t", "b")
    wanted = {"large": large, "small": small}
    good = {
        "large": RemoteFile("large", 9, "s", None), "small": RemoteFile("small", 3, None, "b")
    }  # fmt: skip
    assert differences(snapshot(**good), wanted, ["gone"]) == []
    wrong = {
        "is missing": {"large": good["large"]},
        "has 8 bytes": {**good, "large": RemoteFile("large", 8, "s", None)},
        "the sha256": {**good, "large": RemoteFile("large", 9, "z", None)},
        "in git, expected in LFS": {**good, "large": RemoteFile("large", 9, None, "b")},
        "git's digest": {**good, "small": RemoteFile("small", 3, None, "c")},
        "gone is still there": {**good, "gone": good["small"]},
    }
    for says, shown in wrong.items():
        found = differences(snapshot(**shown), wanted, ["gone"])
        assert len(found) == 1
        assert says in found[0]
