"""nf4 push: the real command and the real huggingface_hub against a Hub on this machine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import LLAMA, llama_tensors, nf4_ok, write_checkpoint_dir
from hub_server import Fault, Hub
from hub_server.fixtures import Runner
from hub_server.published import REPO, require_published
from schemas import document

from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.output.card import HERE

PUT = r"PUT /upload"
COMMIT = r"POST .*/commit/main"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Llama with a vocabulary that makes several files of its 4 MB."""
    tensors = llama_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(16384, 64).mul(0.02).bfloat16()
    root = tmp_path_factory.mktemp("push") / "model"
    return write_checkpoint_dir(root, tensors, {**LLAMA, "vocab_size": 16384})


@pytest.fixture(scope="module")
def made(source) -> Path:
    """An output of three files."""
    nf4_ok("quantize", source, source.parent / "three", "--max-shard-size", "1MB")
    return source.parent / "three"


@pytest.fixture(scope="module")
def made_single(source) -> Path:
    """The same in one."""
    nf4_ok("quantize", source, source.parent / "one")
    return source.parent / "one"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def push(hub, tmp_path, made) -> Runner:
    """Runs nf4 in a directory with an output called `out`."""
    runner = Runner(hub, tmp_path)
    shutil.copytree(made, runner.work / "out")
    return runner


def test_private_by_default_and_the_card_has_the_name(push, hub):
    text = push.ok("push", "out", REPO)
    require_published(hub, push.work / "out")
    repo = hub.store.repos[REPO]
    assert repo.private
    assert f"{hub.url}/{REPO}" in text
    assert "private" in text
    assert repo.branches["main"][:12] in text
    card = repo.head["README.md"].place.read_text()
    assert HERE in (push.work / "out" / "README.md").read_text()
    assert card == (push.work / "out" / "README.md").read_text().replace(HERE, REPO)


def test_public_and_its_document(push, hub):
    found = document(push.ok("push", "out", "model-nf4", "--public", "--json"), "push")
    repo = hub.store.repos[REPO]  # the user's own
    assert not repo.private
    assert found["pushed"] == {
        "repo": REPO, "commit": repo.branches["main"], "url": f"{hub.url}/{REPO}",
        "private": False, "changed": True, "deleted": [],
    }  # fmt: skip
    assert (found["ok"], found["findings"], found["left_files"]) == (True, [], [])
    assert found["files"] == len(repo.head) - 1


def test_the_function_publishes_or_says_why_not(push, hub):
    """`nf4cli.push`, in a process that finds this Hub in its environment."""
    code = (
        "import nf4cli\n"
        f"done = nf4cli.push('out', {REPO!r}, message='by a function')\n"
        "print(done.published.commit, len(done.checked.findings))\n"
        "open('out/config.json', 'a').write(' ')\n"
        f"done = nf4cli.push('out', {REPO!r})\n"
        "print(done.published, [finding.where for finding in done.checked.findings])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=push.work, env=hub.environment(push.home, "hf_write"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    head = hub.store.repos[REPO].branches["main"]
    assert done.stdout.splitlines() == [f"{head} 0", "None ['config.json']"], done.stderr


def test_the_second_time_nothing_is_sent(push, hub):
    push.ok("push", "out", REPO)
    hub.log.clear()
    assert "all of it was there already" in push.ok("push", "out", REPO)
    assert not hub.requests(f"{PUT}|{COMMIT}|batch")
    require_published(hub, push.work / "out")


def test_visibility_of_a_repository_that_exists_stays(push, hub):
    hub.add(REPO, {}, private=True)
    assert "is private, and stays so" in push("push", "out", REPO, "--public").stderr
    assert hub.store.repos[REPO].private
    hub.add("me/open", {})
    done = push("push", "out", "me/open")
    assert done.returncode == 0
    assert "is public: everybody will see" in done.stderr
    assert not hub.store.repos["me/open"].private


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b"theirs", "config.json": b"{}"},
        {"pytorch_model.bin": b"theirs", MANIFEST: b"{}"},
        {"model.safetensors.index.json": b"{}"},
        {"gguf/model-q4.gguf": b"theirs"},
    ],
)
def test_another_model_is_left_alone(push, hub, files):
    repo = hub.add(REPO, files)
    before = dict(repo.branches)
    name = next(iter(files))
    push.fails(2, "push", "out", REPO, says=(name, "nf4 did not put there"))
    assert repo.branches == before
    assert not hub.requests(PUT)


def test_an_earlier_output_is_replaced_whole(push, hub, made, made_single):
    push.ok("push", "out", REPO)
    repo = hub.store.repos[REPO]
    mine = {n: hub.store.file(n, b"my own words") for n in ("README.md", "notes/a.txt")}
    repo.commit({**repo.head, **mine}, "edited on the page")
    found = document(push.ok("push", made_single, REPO, "--json"), "push")
    stale = {p.name for p in made.iterdir()} - {p.name for p in made_single.iterdir()}
    assert set(found["pushed"]["deleted"]) == stale
    assert "model.safetensors.index.json" in stale
    assert len(repo.commits) == 4
    ours = {p.name for p in made_single.iterdir()}
    assert repo.head.keys() == ours | {"notes/a.txt"}
    assert repo.head["README.md"].place.read_bytes() == b"my own words"
    assert repo.head["model.safetensors"].size == (made_single / "model.safetensors").stat().st_size


def test_the_card_is_replaced_when_asked(push, hub):
    hub.add(REPO, {"README.md": b"old"})
    assert "keeps its README.md" in push("push", "out", REPO).stderr
    assert hub.store.repos[REPO].head["README.md"].place.read_bytes() == b"old"
    push.ok("push", "out", REPO, "--replace-card")
    assert REPO in hub.store.repos[REPO].head["README.md"].place.read_text()


def test_a_damaged_output_is_not_pushed(push, hub):
    shard = next((push.work / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = push("push", "out", REPO)
    assert done.returncode == 1
    assert shard.name in done.stdout
    assert "nf4 verify" in done.stderr
    assert not hub.log, "the Hub was asked something"
    found = document(push("push", "out", REPO, "--json").stdout, "push")
    assert (found["ok"], found["pushed"]) == (False, None)
    assert [f["where"] for f in found["findings"]] == [shard.name]
    (push.work / "out" / "config.json").unlink()
    assert "config.json is missing" in push("push", "out", REPO).stdout.replace("\n", " ")


def test_what_is_in_no_manifest_stays_here(push, hub, tmp_path):
    (tmp_path / "secret").write_text("s")
    (push.work / "out" / "secret").symlink_to(tmp_path / "secret")
    (push.work / "out" / "extra.safetensors").write_bytes(b"x")
    done = push("push", "out", REPO)
    assert done.returncode == 0
    assert "extra.safetensors, secret" in done.stderr
    assert not {"secret", "extra.safetensors"} & hub.store.repos[REPO].head.keys()


def test_a_manifest_cannot_publish_other_files(push, hub, tmp_path):
    (push.work / "secret").write_text("s")
    path = push.work / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["output"]["files"].append({"name": "../secret", "size": 1, "digest": "0"})
    path.write_text(json.dumps(manifest))
    push.fails(3, "push", "out", REPO, says=("leads out of the directory",))
    manifest["output"]["files"][-1]["name"] = "link"
    path.write_text(json.dumps(manifest))
    (push.work / "out" / "link").symlink_to(push.work / "secret")
    push.fails(3, "push", "out", REPO, says=("leads out of the directory",))
    assert not hub.log


def test_a_card_the_hub_does_not_take(push, hub):
    (push.work / "out" / "README.md").write_text("---\nlicense: [a, b]\n---\n# mine\n")
    push.fails(3, "push", "out", REPO, says=("README.md", '"license" must be a string'))
    assert hub.store.repos[REPO].head == {}


def test_a_gitignore_that_would_leave_files_out(push, hub):
    names = [p.name for p in (push.work / "out").iterdir()]
    answer = [{"path": n, "uploadMode": "lfs", "shouldIgnore": True} for n in names]
    body = json.dumps({"files": answer}).encode()
    hub.faults.add(Fault("POST .*/preupload", after=1, times=99, status=200, body=body))
    push.fails(2, "push", "out", REPO, says=(".gitignore", "leaves"))


@pytest.mark.parametrize(
    ("code", "arguments", "settings", "says"),
    [
        (3, ("out", REPO), {"token": None}, "without a token"),
        (3, ("out", REPO), {"token": "hf_read"}, "may not write"),
        (3, ("out", REPO), {"token": "hf_wrong"}, "is not valid"),
        (2, ("out", REPO), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        (2, ("out", "a/b/c"), {}, "no name of a repository"),
        (2, ("out", "me/x@main"), {}, "no name of a repository"),
        (2, ("out", "me/x..y"), {}, "me/x..y"),
        (2, ("out", REPO, "--message", " "), {}, "--message"),
        (3, (".", REPO), {}, "expected a directory that nf4 quantize wrote"),
        (3, ("nowhere", REPO), {}, "is no directory"),
        (3, ("out", "other/model"), {"token": "hf_read"}, "may not write"),
    ],
)
def test_refused_in_words(push, code, arguments, settings, says):
    push.fails(code, "push", *arguments, says=(says,), **settings)


FAULTS = {
    "the repository": Fault(r"POST /api/repos/create", status=503, times=2),
    "how to upload": Fault(r"POST .*/preupload", after=2, status=429, headers={"Retry-After": "1"}),
    "where to upload": Fault(r"POST .*/objects/batch", drop=True, times=2),
    "an upload breaks": Fault(PUT, drop=True, times=2),
    "an upload's answer is lost": Fault(PUT, lose=True),
    "the commit": Fault(COMMIT, status=503, times=2),
    "the commit breaks": Fault(COMMIT, drop=True),
    "the commit's answer is lost": Fault(COMMIT, lose=True),
    "the look at the commit": Fault(r"GET /api/models/.*/revision/", drop=True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes(push, hub, name):
    hub.faults.add(Fault(**vars(FAULTS[name])))
    push.ok("push", "out", REPO)
    assert hub.faults.seen
    require_published(hub, push.work / "out")


def test_uploads_in_parts(push, hub):
    """As the Hub wants files of gigabytes; a part that breaks is sent again."""
    hub.part_size = 300_000
    hub.faults.add(Fault(r"PUT /upload.*part=2", drop=True))
    push.ok("push", "out", REPO)
    assert len(hub.requests(r"PUT /upload.*part=")) > 10
    require_published(hub, push.work / "out")


def begin_and_wait(push) -> subprocess.Popen[str]:
    """A push that waits for a busy Hub, that has met the fault."""
    process = push.start("push", "out", REPO)
    push.wait_for_fault(process)
    return process


def test_somebody_else_commits_meanwhile(push, hub):
    repo = hub.add(REPO, {})
    hub.faults.add(Fault(COMMIT, status=503, headers={"Retry-After": "2"}))
    process = begin_and_wait(push)
    theirs = repo.commit({"theirs.txt": hub.store.file("theirs.txt", b"t")}, "theirs")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "another commit" in stderr
    assert repo.branches["main"] == theirs
    hub.log.clear()
    push.ok("push", "out", REPO)
    assert not hub.requests(PUT), "sent again"
    assert {"theirs.txt", MANIFEST} <= repo.head.keys()


def test_a_file_that_changes_meanwhile_is_not_published(push, hub):
    hub.faults.add(Fault(r"POST /api/repos/create", status=503, headers={"Retry-After": "1"}))
    process = begin_and_wait(push)
    shard = sorted((push.work / "out").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"{shard.name} changed while it was sent" in stderr
    assert hub.store.repos[REPO].head == {}


def test_killed_and_begun_again(push, hub):
    hub.faults.add(Fault(PUT, after=2, status=503, times=10**6))
    process = begin_and_wait(push)
    while len(sent := _taken(hub)) < 2:  # the refused third may be answered before these
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    repo = hub.store.repos[REPO]
    assert repo.head == {}, "half a model is to be seen"
    hub.faults.clear()
    hub.log.clear()
    push.ok("push", "out", REPO)
    assert not sent & {r.path.split("?")[0] for r in hub.requests(PUT)}
    require_published(hub, push.work / "out")


def _taken(hub) -> set[str]:
    """Paths of the uploads that the Hub has."""
    return {r.path.split("?")[0] for r in hub.requests(PUT) if r.status == 200}


def test_ctrl_c_does_not_wait_for_the_network(push, hub):
    hub.faults.add(Fault(PUT, status=503, headers={"Retry-After": "60"}, times=10**6))
    process = begin_and_wait(push)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert hub.store.repos[REPO].head == {}


def test_what_was_pushed_is_good(push, source):
    push.ok("push", "out", REPO)
    text = push.ok("verify", REPO, "--source", source)
    assert "every byte is the one the source gives" in text
    assert "not checked" not in text


def test_a_pipeline(push, hub, pipe):
    """All of it, over a checkpoint that was there, and back to the checkpoint."""
    push.ok("push", "out", REPO)
    push.ok("quantize", pipe, "pipeline")
    found = document(push.ok("push", "pipeline", REPO, "--replace-card", "--json"), "push")
    assert {MANIFEST, "model.safetensors.index.json"} <= set(found["pushed"]["deleted"])
    require_published(hub, push.work / "pipeline", commits=3)
    card = hub.store.repos[REPO].head["README.md"].place.read_text()
    assert f'DiffusionPipeline.from_pretrained("{REPO}"' in card
    assert "every byte is the one the source gives" in push.ok("verify", REPO, "--source", pipe)
    push.ok("push", "out", REPO, "--replace-card")
    require_published(hub, push.work / "out", commits=4)


@pytest.mark.loaders
def test_what_was_pushed_loads(push, hub, tmp_path):
    push.ok("push", "out", REPO)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"there = AutoModelForCausalLM.from_pretrained('{REPO}')\n"
        "here = AutoModelForCausalLM.from_pretrained('out')\n"
        "ids = torch.arange(8)[None]\n"
        "assert torch.equal(there(ids).logits, here(ids).logits)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=push.work, env=hub.environment(push.home),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
