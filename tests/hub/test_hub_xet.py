"""Uploads and downloads through the store that the Hub itself uses (Xet): the real command,
huggingface_hub and hf_xet, against tests/hub_server/xet.py."""

from __future__ import annotations

import re
import signal
import time

import pytest
from helpers import nightly_but
from hub_server import Fault
from hub_server.fixtures import Runner, Watch, bytes_in, converted, hub, model  # noqa: F401 - fixtures
from hub_server.published import REPO, require_published

from nf4cli.hub.xet_progress import reporting

XORB, SHARD = "POST /v1/xorbs", "POST /v1/shards"
TOKEN = "xet-write-token"


@pytest.fixture
def nf4(hub, tmp_path) -> Runner:  # noqa: F811
    return Runner(hub, tmp_path, xet=True)


@pytest.fixture
def push(nf4, converted):  # noqa: F811
    """Arguments that publish the output."""
    return ("push", converted, REPO)


def test_there_and_back(nf4, push, hub, converted, model):  # noqa: F811
    nf4.ok(*push)
    assert hub.requests(XORB)
    assert not hub.requests("PUT ")
    require_published(hub, converted)
    hub.log.clear()
    text = nf4.ok("verify", REPO, "--source", model)
    assert "every byte is the one the source gives" in text
    assert hub.requests("GET /v1/reconstructions"), "downloaded another way"
    nf4.ok("verify", REPO, "--source", "org/model", "--disk", "10MB")


def test_what_is_there_is_not_sent_again(nf4, push, hub):  # noqa: F811
    nf4.ok(*push)
    hub.log.clear()
    nf4.ok(*push)
    assert not hub.requests("POST /v1/")


def test_the_bound_on_the_disk_holds_with_files_that_leave(nf4, hub, converted, model):  # noqa: F811
    with Watch(nf4.work) as watch:
        nf4.ok("quantize", "org/model", "--disk", "8MB", "--push-to", REPO,
               "--max-shard-size", "1MB")  # fmt: skip
    assert watch.most <= 8_000_000 < bytes_in(model) / 5
    assert bytes_in(nf4.home / "xet") < 2_000_000, "the storage's own notes"
    assert hub.requests(XORB)
    for path in converted.glob("*.safetensors"):
        assert hub.store.repos[REPO].head[path.name].place.read_bytes() == path.read_bytes()


FAULTS = {
    "no token for a while": Fault(TOKEN, status=503, times=2),
    "the storage is busy": Fault(XORB, status=503, times=2),
    "too many requests": Fault(XORB, status=429, headers={"Retry-After": "1"}),
    "the line breaks": Fault(XORB, drop=True, times=2),
    "an answer is lost": Fault(XORB, lose=True),
    "the list of chunks is refused for a while": Fault(SHARD, status=503),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes(nf4, push, hub, converted, name):  # noqa: F811
    hub.faults.add(Fault(**vars(FAULTS[name])))
    nf4.ok(*push)
    assert hub.faults.seen
    require_published(hub, converted)


@pytest.mark.parametrize("what", [TOKEN, XORB, SHARD])
def test_what_is_forbidden_is_said_at_once(nf4, push, hub, what):  # noqa: F811
    hub.faults.add(Fault(what, status=403, times=10**6))
    nf4.fails(3, *push, says=("refused it", "403", "HF_TOKEN"))
    assert hub.store.repos[REPO].head == {}
    hub.faults.clear()
    nf4.ok(*push)


def test_a_server_without_such_a_storage(nf4, push, hub):  # noqa: F811
    hub.faults.add(Fault(TOKEN, status=404, times=10**6))
    nf4.fails(4, *push, says=("HF_HUB_DISABLE_XET=1",))
    nf4.ok(*push, HF_HUB_DISABLE_XET="1")


@pytest.mark.parametrize("number", nightly_but([signal.SIGKILL], [signal.SIGINT, signal.SIGKILL]))
def test_stopped_and_begun_again(nf4, push, hub, converted, number):  # noqa: F811
    hub.faults.add(Fault(XORB, after=3, status=503, times=10**6))
    process = nf4.start(*push)
    nf4.wait_for_fault(process)
    begun = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[number], stderr
    assert "Traceback" not in stderr
    assert hub.store.repos[REPO].head == {}
    hub.faults.clear()
    nf4.ok(*push)
    require_published(hub, converted)


def test_a_file_that_changes_meanwhile_is_not_published(nf4, hub, model):  # noqa: F811
    """Its digest is told beforehand, and a storage need not look at the bytes."""
    nf4.ok("quantize", model, "out")
    hub.faults.add(Fault(TOKEN, status=503))
    process = nf4.start("push", "out", REPO)
    nf4.wait_for_fault(process)
    shard = nf4.work / "out" / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    assert f"{shard.name} changed while it was sent" in stderr
    assert hub.store.repos[REPO].head == {}


def test_how_far_a_file_is(nf4, hub, model):  # noqa: F811
    """One file, so that what is between its ends is told by the storage."""
    nf4.ok("quantize", model, "out")
    hub.rate = 4e6
    process = nf4.start("push", "out", REPO, NF4_HEARTBEAT="0.5")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    shares = {int(share) for share in re.findall(r"pushing (\d+)%", stderr)}
    assert len([s for s in shares if 10 < s < 95]) >= 3, stderr
    assert "pushing done: " in stderr


def test_uploads_that_nobody_watches_are_left_alone():
    from huggingface_hub.utils import _xet

    with reporting(print):
        ours = _xet.get_xet_session
        assert type(ours()).__module__ == "nf4cli.hub.xet_progress"
        with reporting(print):
            assert _xet.get_xet_session is ours
    assert type(_xet.get_xet_session()).__module__ != "nf4cli.hub.xet_progress"
