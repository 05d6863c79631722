"""nf4 quantize --ray from a Hub and to one: nodes fetch and upload, the driver commits."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import nightly_but, same_files
from hub_server.published import REPO, require_published

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Ray's nodes of the tests run on Linux"
)
RAY = ("--ray", "local", "--workers", 1, "--max-shard-size", "1MB")
UPLOADS = r"PUT /upload"


@pytest.fixture
def one(nf4_hub) -> Path:
    """What one machine makes of the same model of the Hub; its files stay in no cache."""
    nf4_hub.ok("quantize", "org/model", "one", "--max-shard-size", "1MB", "--disk", "90MB")
    return (nf4_hub.work / "one").rename(nf4_hub.work.parent / "one")


def test_nodes_fetch_and_upload(hub, nf4_hub, one):
    """Nothing large is on the driver's disk, and the commit has what one machine would make."""
    stdout = nf4_hub.ok("quantize", "org/model", "--push-to", REPO, *RAY, "--disk", "9MB")
    assert REPO in stdout
    require_published(hub, one)
    assert not list(nf4_hub.work.iterdir())
    assert not list(nf4_hub.home.rglob("*.safetensors"))


def test_the_output_stays_in_a_shared_directory(hub, nf4_hub, one):
    nf4_hub.ok("quantize", "org/model", "out", *RAY)
    assert same_files(one, nf4_hub.work / "out")


def test_from_a_directory_and_published(hub, nf4_hub, model, converted):
    nf4_hub.ok("quantize", model, "out", *RAY, "--push-to", REPO)
    assert same_files(converted, nf4_hub.work / "out")
    require_published(hub, converted)


@pytest.mark.parametrize("number", nightly_but([signal.SIGINT], [signal.SIGINT, signal.SIGKILL]))
def test_a_stopped_run_sends_nothing_twice(hub, nf4_hub, one, number):
    words = ("quantize", "org/model", "--push-to", REPO, *RAY)
    process = nf4_hub.start(*words)
    journal = nf4_hub.work / ".models--me--model-nf4.partial" / "journal"
    while not journal.exists() or journal.read_bytes().count(b'"uploaded"') < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL)
    done = journal.read_bytes().count(b'"uploaded"')
    time.sleep(1)  # tasks that are left behind end with their cluster
    before = len(hub.requests(UPLOADS))
    nf4_hub.ok(*words, "--resume")
    require_published(hub, one)
    total = len(list(one.glob("*.safetensors")))
    assert len(hub.requests(UPLOADS)) - before <= total - done


def test_what_is_refused(hub, nf4_hub):
    nf4_hub.fails(
        2, "quantize", "org/model", "--push-to", REPO, *RAY, "--disk", "1MB",
        says=("--disk 1,000,000 bytes is too little for one output file", "the smallest that"),
    )  # fmt: skip
    nf4_hub.fails(
        3, "quantize", "org/model", "--push-to", REPO, *RAY, token="hf_read", says=("token",)
    )
    assert not list(nf4_hub.work.iterdir())
