"""What goes wrong between a run and its Hub: every fault ends in the right bytes or in words."""

from __future__ import annotations

import signal
import time

import pytest
from helpers import nightly_but, same_files
from hub_server import Fault
from hub_server.fixtures import bytes_in

FILE = r"GET /files/.*00007-of"
PUSH = ("--push-to", "me/model-nf4", "--max-shard-size", "1MB")
BUT = ("nf4_manifest.json", "README.md")

READING = {
    "the Hub is busy": Fault(r"GET /api/models/org/model", status=503, times=2),
    "too many requests": Fault(
        r"GET /api/models/org/model", status=429, headers={"Retry-After": "1"}
    ),
    "too many requests for files": Fault(FILE, after=1, status=429, headers={"Retry-After": "1"}),
    "a file's server is busy": Fault(FILE, after=1, status=503, times=2),
    "no answer": Fault(r"GET /api/models/org/model", drop=True),
    "no answer for a header": Fault(FILE, drop=True),
    "no answer for a file": Fault(FILE, after=1, drop=True, times=2),
    "a small file breaks": Fault(r"GET /org/model/resolve/.*/tokenizer.json", cut=3),
    "a header breaks": Fault(FILE, cut=100),
    "a file breaks": Fault(FILE, after=1, cut=700_000, times=3),
    "a file breaks at its first byte": Fault(FILE, after=1, cut=0, times=2),
    "a bit flips": Fault(FILE, after=1, flip=1_000_000),
    "a bit of a small file flips": Fault(r"GET /org/model/resolve/.*/config.json", flip=5),
    "an address has expired": Fault(FILE, after=1, status=403, body=b"<Error>expired</Error>"),
    "ranges are not known": Fault(FILE, after=0, whole=True, times=99),
    "a page in place of an answer": Fault(
        r"GET /api/models/org/model", body=b"<html>maintenance</html>", status=502
    ),
    "a page that calls itself an answer": Fault(
        r"GET /api/models/org/model", body=b"<html>sign in to this network</html>", status=200
    ),
    "an answer of something else": Fault(r"GET /api/models/org/model", body=b"[1]", status=200),
}


CASES = [(name, True) for name in READING] + [
    (name, False) for name, fault in READING.items() if fault.path == FILE or "small" in name
]
THROUGH_THE_CACHE = ("no answer for a file", "a file breaks", "a bit of a small file flips")
"""What is also met on every commit where files go through the cache, which is not ours."""


@pytest.mark.parametrize(
    "case", nightly_but([c for c in CASES if c[1] or c[0] in THROUGH_THE_CACHE], CASES), ids=str
)
def test_reading(nf4_hub, hub, converted, case):
    name, bounded = case
    hub.faults.add(Fault(**vars(READING[name])))
    options = ("--disk", "40MB") if bounded else ()
    nf4_hub.ok("quantize", "org/model", "out", "--max-shard-size", "1MB", *options)
    assert hub.faults.seen >= 1
    assert same_files(nf4_hub.work / "out", converted, but=BUT)
    assert [p.name for p in nf4_hub.work.iterdir()] == ["out"]


def test_a_break_costs_what_it_broke(nf4_hub, hub, model):
    """After a break the file goes on where it was."""
    hub.faults.add(Fault(FILE, after=1, cut=1_000_000))
    nf4_hub.ok("quantize", "org/model", "out", "--disk", "40MB")
    size = (model / "model-00007-of-00024.safetensors").stat().st_size
    whole = hub.requests(FILE)[1:]
    assert [r.status for r in whole] == [200, 206]
    assert sum(r.sent for r in whole) < size + 70_000


FOR_EVER = [{"status": 503}, {"drop": True}, {"cut": 0}]


@pytest.mark.parametrize("setting", nightly_but(FOR_EVER[-1:], FOR_EVER))
def test_what_does_not_pass_ends_in_words_and_can_be_continued(nf4_hub, hub, converted, setting):
    hub.faults.add(Fault(FILE, after=1, times=10**6, **setting))
    arguments = ("quantize", "org/model", "out", "--disk", "40MB", "--max-shard-size", "1MB")
    environment = {"HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    process = nf4_hub.start(*arguments, **environment)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 4, stderr
    assert "model-00007-of-00024.safetensors" in stderr
    assert "continue with the same command and --resume" in stderr
    assert not (nf4_hub.work / "out").exists()
    hub.faults.clear()
    before = len(hub.log)
    nf4_hub.ok(*arguments, "--resume")
    again = {r.path.split("?")[0] for r in hub.log[before:] if r.range is None and r.cdn}
    assert not any("00001-of" in path or "00006-of" in path for path in again)
    assert same_files(nf4_hub.work / "out", converted, but=BUT)


def test_the_hub_goes_away(nf4_hub, hub):
    """The port is closed: the connection is refused."""
    for server in hub._servers:
        server.shutdown()
        server.server_close()
    nf4_hub.fails(4, "quantize", "org/model", "out", says=("is no path here", "HF_ENDPOINT"))


@pytest.mark.parametrize("number", nightly_but([signal.SIGINT], [signal.SIGKILL, signal.SIGINT]))
def test_a_run_that_is_stopped_fetches_only_what_is_missing(nf4_hub, hub, converted, number):
    hub.rate = 8e6
    arguments = ("quantize", "org/model", "out", "--disk", "40MB", "--max-shard-size", "1MB")
    process = nf4_hub.start(*arguments)
    weights = r"GET /files/.*safetensors"
    partial = nf4_hub.work / ".out.partial" / "source"
    while not any(".part" in p.name and p.stat().st_size > 500_000 for p in _files(partial)) or (
        len([r for r in hub.requests(weights) if r.status == 200]) < 6
    ):
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    there = sum(p.stat().st_size for p in _files(partial))
    # A part that was seen may have become whole, and been converted, before the signal came.
    assert there > 65_536, "more than a header is kept"
    done = [r for r in hub.requests(weights) if r.status == 200 and r.sent]
    hub.rate = None
    time.sleep(0.3)  # what the server still sends to nobody
    hub.log.clear()
    nf4_hub.ok(*arguments, "--resume")
    fetched = hub.requests(weights)
    bodies = [r for r in fetched if r.range != "bytes=0-65535"]
    size = sum(
        f.size for n, f in hub.store.repos["org/model"].head.items() if n.endswith(".safetensors")
    )
    assert any(r.status == 206 for r in bodies), "no file was continued"
    assert sum(r.sent for r in bodies) <= size - there
    assert len(bodies) < 24
    assert done
    assert same_files(nf4_hub.work / "out", converted, but=BUT)


def _files(directory):
    try:
        return [p for p in directory.iterdir() if p.exists()]
    except FileNotFoundError:
        return []


WRITING = {
    "busy before an upload": Fault(r"POST .*lfs/objects/batch", status=503),
    "too many uploads": Fault(r"PUT /upload", status=429, headers={"Retry-After": "1"}),
    "an upload is refused for a while": Fault(r"PUT /upload", after=3, status=503, times=2),
    "an upload has no answer": Fault(r"PUT /upload", after=2, drop=True),
    "an upload's answer is lost": Fault(r"PUT /upload", after=2, lose=True),
    "the commit has no answer": Fault(r"POST .*/commit/main", drop=True),
    "the commit's answer is lost": Fault(r"POST .*/commit/main", lose=True),
    "the commit is refused for a while": Fault(r"POST .*/commit/main", status=503, times=2),
}


@pytest.mark.parametrize("name", WRITING)
def test_writing(nf4_hub, hub, converted, name):
    hub.faults.add(Fault(**vars(WRITING[name])))
    nf4_hub.ok("quantize", "org/model", "--disk", "10MB", *PUSH)
    assert hub.faults.seen >= 1
    repo = hub.store.repos["me/model-nf4"]
    assert len(repo.commits) == 2, "one commit beside the first, empty one"
    _require_the_same(repo, converted)
    assert not list(nf4_hub.work.iterdir())


def _require_the_same(repo, converted):
    for path in converted.glob("*.safetensors"):
        assert repo.head[path.name].place.read_bytes() == path.read_bytes()
    assert {"README.md", "config.json", "nf4_manifest.json", "tokenizer.json"} <= repo.head.keys()


def test_a_stopped_push_sends_nothing_twice(nf4_hub, hub, converted):
    hub.rate = 15e6
    arguments = ("quantize", "org/model", "--disk", "10MB", *PUSH)
    process = nf4_hub.start(*arguments)
    while len(hub.requests("PUT /upload")) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    time.sleep(0.3)
    assert hub.store.repos["me/model-nf4"].head == {}, "half a model is to be seen"
    sent = {r.path.split("?")[0] for r in hub.requests("PUT /upload") if r.status == 200}
    hub.rate = None
    hub.log.clear()
    nf4_hub.ok(*arguments, "--resume")
    again = {r.path.split("?")[0] for r in hub.requests("PUT /upload")}
    assert not sent & again
    _require_the_same(hub.store.repos["me/model-nf4"], converted)
    assert not list(nf4_hub.work.iterdir())


def test_a_hub_that_lost_what_was_sent(nf4_hub, hub, model, converted):
    """The uploads of an earlier run are gone by the time of the commit: words, no half model; then
    they are made again."""
    arguments = ("quantize", "org/model", "--disk", "10MB", *PUSH)
    hub.faults.add(Fault(r"POST .*/commit/main", status=500, times=10**6))
    done = nf4_hub(*arguments)
    assert done.returncode == 4
    hub.faults.clear()
    for path in hub.store.objects.iterdir():
        path.unlink()
    nf4_hub.fails(4, *arguments, "--resume", says=("no longer has", "and --resume"))
    assert hub.store.repos["me/model-nf4"].head == {}
    hub.add("org/model", model)  # its small files had lain there, too
    nf4_hub.ok(*arguments, "--resume")
    _require_the_same(hub.store.repos["me/model-nf4"], converted)


def test_someone_else_commits_meanwhile(nf4_hub, hub):
    nf4_hub.ok("quantize", "org/model", *PUSH)
    repo = hub.store.repos["me/model-nf4"]
    hub.rate = 20e6
    process = nf4_hub.start("quantize", "org/model", "out", *PUSH, "--blocksize", "128")
    while len(hub.requests("PUT /upload")) < 20:
        time.sleep(0.005)
    other = repo.commit({**repo.head, "note.txt": hub.store.file("note.txt", b"mine")}, "other")
    hub.rate = None
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "got another commit" in stderr
    assert "out is complete, but was not published" in stderr
    assert repo.branches["main"] == other
    assert bytes_in(nf4_hub.work / "out") > 10**7


@pytest.mark.parametrize(("token", "says"), [(None, "without a token"), ("hf_read", "HF_TOKEN")])
def test_who_may_write_is_asked_before_the_work(nf4_hub, hub, token, says):
    nf4_hub.fails(3, "quantize", "org/model", *PUSH, says=(says,), token=token)
    bodies = [r for r in hub.requests("GET /files") if r.range is None]
    assert not bodies
    assert not list(nf4_hub.work.iterdir())
