"""Models of a Hub through a mirror that nobody here wrote: olah answers nf4, and asks our own Hub.

So both ends are held to what a third party takes for the Hub's API: nf4's requests by its server,
the answers of tests/hub_server by its client.  It is for reading; it takes no commits.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import same_files
from hub_server import Hub
from hub_server.fixtures import SHARDS, Runner, Watch

pytestmark = pytest.mark.long  # the mirror takes twenty seconds of a processor
BOUND = ("--disk", "40MB", "--max-shard-size", "1MB")
BUT = ("nf4_manifest.json", "README.md")


@pytest.fixture
def mirror(hub: Hub, tmp_path: Path) -> Iterator[str]:
    """The address of a mirror of the Hub."""
    command = os.environ.get("NF4_MIRROR")
    if not command:
        pytest.skip("NF4_MIRROR names no olah-cli, a mirror of the Hub; scripts/test installs it")
    upstream, own = hub.url.removeprefix("http://"), f"127.0.0.1:{_free_port()}"
    place = tmp_path / "mirror"
    place.mkdir()
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [command, "--host", "127.0.0.1", "--port", own.rpartition(":")[2],
             "--hf-scheme", "http", "--hf-netloc", upstream, "--hf-lfs-netloc", upstream,
             "--mirror-scheme", "http", "--mirror-netloc", own, "--mirror-lfs-netloc", own,
             "--repos-path", str(place / "repos"), "--log-path", str(place / "logs")],
            cwd=place, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        _wait_for(f"http://{own}/api/models/org/model", place / "log", process)
        yield f"http://{own}"
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the mirror does not answer:\n{log.read_text()[-2000:]}")


def test_a_model_through_a_mirror(nf4_hub: Runner, hub: Hub, mirror: str, converted: Path):
    there = {"HF_ENDPOINT": mirror}
    assert "bound   --disk" in nf4_hub.ok("quantize", "org/model", "--plan", **there)
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok("quantize", "org/model", "out", *BOUND, **there)
    assert watch.most <= 40_000_000
    assert same_files(nf4_hub.work / "out", converted, but=BUT)
    nf4_hub.ok("verify", "out", "--source", "org/model", "--disk", "40MB", **there)
    nf4_hub.ok("quantize", "org/model@main", "cached", "--max-shard-size", "1MB", **there)
    assert same_files(nf4_hub.work / "cached", converted, but=BUT)
    assert len(list((nf4_hub.home / "hub").rglob("snapshots/*/*.safetensors"))) == SHARDS
    nf4_hub.fails(3, "quantize", "org/nothing", "no", says=("org/nothing",), **there)


def test_what_was_pushed_is_proved_through_a_mirror(nf4_hub: Runner, hub: Hub, mirror: str):
    pushed = ("--disk", "10MB", "--push-to", "me/it", "--public", "--max-shard-size", "1MB")
    nf4_hub.ok("quantize", "org/model", *pushed)
    words = ("verify", "me/it", "--source", "org/model", "--disk", "10MB")
    assert "is good" in nf4_hub.ok(*words, HF_ENDPOINT=mirror)
