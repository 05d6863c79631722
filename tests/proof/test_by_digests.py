"""nf4 verify --disk: a proof, by digests, of what does not fit here."""

from __future__ import annotations

import json
import signal
import time
from urllib.parse import quote

import pytest
from helpers import nightly_but
from hub_server.fixtures import Watch
from schemas import document

from nf4cli.checkpoint.discovery import MANIFEST

OUTPUT, SOURCE = "me/model-nf4", "org/model"
WEIGHTS = r"GET /files/.*safetensors"
PUSH = ("--push-to", OUTPUT, "--max-shard-size", "1MB")
SHARD = "model-00005-of-00017.safetensors"


@pytest.fixture
def pushed(nf4_hub, hub):
    """The model, published in files of 1 MB; nothing of it is here."""
    nf4_hub.ok("quantize", SOURCE, "--disk", "10MB", *PUSH)
    hub.log.clear()
    assert SHARD in hub.store.repos[OUTPUT].head
    return hub.store.repos[OUTPUT]


def weights_fetched(hub, repo: str) -> set[str]:
    """Weight files of a model whose bytes were asked for, headers apart."""
    requests = hub.requests(rf"GET /files/{quote(repo, '')}/.*safetensors")
    assert requests, "headers are always asked for"
    return {r.path.partition("?")[0] for r in requests if r.range != "bytes=0-65535"}


def test_from_hub_to_hub_within_the_bound(nf4_hub, hub, pushed):
    with Watch(nf4_hub.work) as watch:
        found = nf4_hub("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB", "--junit", "j.xml")
    assert found.returncode == 0, found.stderr
    here = f"{OUTPUT}@{pushed.branches['main']}"
    assert found.stdout.endswith(f"{here} is good\n")
    assert "every file is the one the source gives, by its sha256" in found.stdout
    assert f"SHA-256 which {hub.url} states is its word" in " ".join(found.stdout.split())
    assert 1_000_000 < watch.most <= 10_000_000
    assert weights_fetched(hub, SOURCE)
    assert not weights_fetched(hub, OUTPUT)
    assert [p.name for p in nf4_hub.work.iterdir()] == ["j.xml"]
    assert f'name="{here}"' in (nf4_hub.work / "j.xml").read_text()
    assert not list(nf4_hub.home.rglob("*.safetensors"))


def test_its_document(nf4_hub, pushed):
    text = nf4_hub.ok("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB", "--json")
    found = document(text, "verify")
    assert found["ok"]
    assert [check["level"] for check in found["checks"]] == ["manifest", "source"]


def test_what_quantize_says_next_is_what_works(nf4_hub):
    done = nf4_hub.ok("quantize", SOURCE, "--disk", "10MB", *PUSH)
    line = next(line for line in done.splitlines() if line.startswith("next"))
    words = line.split()[2:]
    assert words[-2:] == ["--disk", "10MB"]
    nf4_hub.ok(*words)


def test_an_output_that_lies_here(nf4_hub, hub):
    nf4_hub.ok("quantize", SOURCE, "out", "--disk", "40MB")
    words = ("verify", "out", "--source", SOURCE, "--disk", "30MB")
    assert "every byte is the one written" in nf4_hub.ok(*words)
    assert [p.name for p in nf4_hub.work.iterdir()] == ["out"]
    shard = next((nf4_hub.work / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    found = nf4_hub(*words)
    assert found.returncode == 1
    assert "out is NOT good" in found.stdout
    assert "FAILED" in found.stdout or "manifest" in found.stdout
    assert "every file is the one the source gives" in found.stdout, "the manifest is as it was"


RECIPES = [("--scale", "search"), ("--quant-type", "fp4"), ("--no-double-quant",)]


@pytest.mark.parametrize("options", nightly_but(RECIPES[:1], RECIPES))
def test_every_recipe(nf4_hub, options):
    nf4_hub.ok("quantize", SOURCE, "--disk", "12MB", *PUSH, *options)
    nf4_hub.ok("verify", OUTPUT, "--source", SOURCE, "--disk", "12MB")


def test_a_local_source_of_what_is_on_a_hub(nf4_hub, model, pushed):
    nf4_hub.ok("verify", OUTPUT, "--source", model, "--disk", "4MB")


def swap(hub, repo, name: str, data: bytes) -> None:
    repo.commit({**repo.head, name: hub.store.file(name, data)}, f"another {name}")


def test_a_file_that_is_another(nf4_hub, hub, pushed):
    data = bytearray(pushed.head[SHARD].place.read_bytes())
    data[-1] ^= 1
    swap(hub, pushed, SHARD, bytes(data))
    found = nf4_hub("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    assert found.returncode == 1
    text = " ".join(found.stdout.split())
    assert f"manifest {SHARD} has {len(data):,} bytes and the SHA-256" in text
    assert "NOT good: 1 finding" in text


def test_a_lie_with_a_manifest_to_it(nf4_hub, hub, pushed):
    """File, manifest and Hub agree; only the source does not give that file."""
    data = bytearray(pushed.head[SHARD].place.read_bytes())
    data[-1] ^= 1
    file = hub.store.file(SHARD, bytes(data))
    manifest = json.loads(pushed.head[MANIFEST].place.read_text())
    for record in manifest["output"]["files"]:
        if record["name"] == SHARD:
            record["digest"] = file.sha256
    swap(hub, pushed, SHARD, bytes(data))
    swap(hub, pushed, MANIFEST, json.dumps(manifest, indent=2).encode())
    found = nf4_hub("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    assert found.returncode == 1
    text = " ".join(found.stdout.split())
    assert f"source {SHARD}: the source gives {len(data):,} bytes with the sha256" in text
    assert f"{MANIFEST} has {len(data):,} bytes, {file.sha256}" in text


def test_an_index_that_lies(nf4_hub, hub, pushed):
    name = "model.safetensors.index.json"
    index = json.loads(pushed.head[name].place.read_text())
    index["weight_map"]["lm_head.weight"] = SHARD
    swap(hub, pushed, name, json.dumps(index).encode())
    found = nf4_hub("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    assert found.returncode == 1
    text = " ".join(found.stdout.split())
    assert f"structure {name} has another file for 1 tensors than the one that has them" in text
    assert f"manifest {name} is not what was written" in text


def test_small_files_are_read(nf4_hub, hub, pushed):
    config = json.loads(pushed.head["config.json"].place.read_text())
    swap(hub, pushed, "config.json", json.dumps({**config, "vocab_size": 511}).encode())
    found = nf4_hub("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    assert found.returncode == 1
    assert "config.json: vocab_size is 511" in " ".join(found.stdout.split())


def test_the_commit_that_the_manifest_names(nf4_hub, hub, pushed):
    """The source has moved on; what it was made from is still the question. Unless asked."""
    repo = hub.store.repos[SOURCE]
    name = next(n for n in sorted(repo.head) if n.endswith("00007-of-00024.safetensors"))
    data = bytearray(repo.head[name].place.read_bytes())
    data[-2] ^= 1
    swap(hub, repo, name, bytes(data))
    found = nf4_hub("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    assert found.returncode == 0, found.stdout
    assert "which the manifest names" in found.stderr
    nf4_hub.ok("verify", OUTPUT, "--source", SOURCE)
    found = nf4_hub("verify", OUTPUT, "--source", f"{SOURCE}@main", "--disk", "10MB")
    assert found.returncode == 1
    assert f"{SOURCE}@{repo.branches['main']}/{name} is not the file" in " ".join(
        found.stdout.split()
    )


def test_a_proof_that_was_killed_goes_on(nf4_hub, hub, pushed):
    hub.rate = 20e6
    words = ("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    process = nf4_hub.start(*words)
    while hub.sent(WEIGHTS) < 2 * 10**7:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.rate = None
    first = weights_fetched(hub, SOURCE)
    hub.log.clear()
    done = nf4_hub(*words)
    assert done.returncode == 0, done.stderr
    assert "continuing an earlier run" in done.stderr
    assert 0 < len(weights_fetched(hub, SOURCE)) < 24
    assert len(first | weights_fetched(hub, SOURCE)) == 24
    assert not list(nf4_hub.work.iterdir())


def test_an_interruption_says_how_to_go_on(nf4_hub, hub, pushed):
    hub.rate = 20e6
    process = nf4_hub.start("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    while hub.sent(WEIGHTS) < 2 * 10**7:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from there" in told
    assert "--resume" not in told
    words = ("verify", OUTPUT, "--source", SOURCE, "--disk", "9MB")
    hub.rate = None
    assert nf4_hub(*words).returncode == 0, "the bound may be another"


def test_what_another_proof_left_is_no_obstacle(nf4_hub, hub, pushed):
    hub.rate = 4e6
    process = nf4_hub.start("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    while hub.sent(WEIGHTS) < 10**7:
        time.sleep(0.01)
    words = ("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    nf4_hub.fails(2, *words, says=("another run is writing",))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(nf4_hub.work.iterdir())) == 1
    hub.rate = None
    swap(hub, pushed, "notes.md", b"another commit")
    done = nf4_hub(*words)
    assert done.returncode == 0, done.stderr
    assert "continuing" not in done.stderr
    assert not list(nf4_hub.work.iterdir())


def edited(hub, pushed, change) -> None:
    manifest = json.loads(pushed.head[MANIFEST].place.read_text())
    change(manifest)
    swap(hub, pushed, MANIFEST, json.dumps(manifest, indent=2).encode())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["recipe"].update(method="gptq", scale="search"), "chosen by gptq"),
        (lambda m: m["recipe"].update(on_nonfinite="keep"), "--on-nonfinite keep looks at all"),
        (lambda m: m["digests"].update(files="blake3"), "a Hub states SHA-256"),
    ],
)
def test_outputs_that_digests_do_not_prove(nf4_hub, hub, pushed, change, says):
    edited(hub, pushed, change)
    words = ("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    nf4_hub.fails(2, *words, says=("--disk does not go with", says, "Leave it out"))
    assert not weights_fetched(hub, OUTPUT)


def test_offline_the_files_of_the_cache_are_looked_at(nf4_hub, hub, pushed):
    nf4_hub.ok("verify", OUTPUT, "--source", SOURCE)  # both are there then
    hub.log.clear()
    words = ("verify", OUTPUT, "--source", SOURCE, "--disk", "10MB")
    found = nf4_hub(*words, HF_HUB_OFFLINE="1")
    assert found.returncode == 0, found.stderr
    assert f"{OUTPUT}@{pushed.branches['main']} is good" in found.stdout
    assert "is its word" not in found.stdout
    assert not hub.log
    assert not list(nf4_hub.work.iterdir())


def test_what_makes_no_sense(nf4_hub, hub, model, converted, pushed):
    ask = ("--disk", "10MB")
    nf4_hub.fails(2, "verify", OUTPUT, *ask, says=("--disk needs --source",))
    nf4_hub.fails(
        2, "verify", OUTPUT, "--source", SOURCE, *ask, "--sample", "5%", says=("--sample",)
    )
    nf4_hub.fails(2, "verify", converted, "--source", model, *ask, says=("both lie here",))
    nf4_hub.fails(2, "verify", OUTPUT, "--source", SOURCE, "--disk", "many", says=("--disk",))
    nf4_hub.fails(
        2, "verify", OUTPUT, "--source", SOURCE, "--disk", "1MB",
        says=("--disk 1,000,000 bytes is too little", "the smallest that works is"),
    )  # fmt: skip
    says = (f"has no {MANIFEST}, by whose digests",)
    nf4_hub.fails(3, "verify", SOURCE, "--source", SOURCE, *ask, says=says)
    assert not list(nf4_hub.work.iterdir())
