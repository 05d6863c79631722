"""Adapters and bases on a Hub."""

from __future__ import annotations

import json
import time

import pytest
from helpers import same_files
from hub_server import Fault
from hub_server.fixtures import SHARDS
from tiny_adapters import write_adapter

MANIFEST = "nf4_manifest.json"


@pytest.fixture
def adapter(model, hub, tmp_path):
    """An adapter that lies here and on the Hub."""
    place = write_adapter(model, tmp_path / "lora")
    hub.add("org/lora", place)
    return place


def test_an_adapter_of_a_hub_gives_the_bytes_of_a_local_one(nf4_hub, hub, adapter, model):
    size = ("--max-shard-size", "1MB")
    nf4_hub.ok("quantize", model, "local", *size, "--adapter", adapter)
    nf4_hub.ok("quantize", model, "here", *size, "--adapter", "org/lora")
    nf4_hub.ok("quantize", "org/model", "out", *size, "--adapter", "org/lora")
    out = nf4_hub.work / "out"
    for name in ("local", "here"):
        assert same_files(out, nf4_hub.work / name, but=(MANIFEST, "README.md"))
    (entry,) = json.loads((out / MANIFEST).read_text())["recipe"]["adapters"]
    assert entry["repo"] == "org/lora"
    assert entry["commit"] == hub.store.repos["org/lora"].branches["main"]
    assert "--adapter org/lora@" in (out / "README.md").read_text()
    nf4_hub.ok("verify", "out", "--source", "org/model", "--adapter", "org/lora")
    nf4_hub.ok("verify", "out", "--source", model, "--adapter", adapter)


def test_an_adapter_goes_with_a_bound_and_a_push(nf4_hub, hub, adapter):
    bound = ("--disk", "6MB", "--max-shard-size", "1MB", "--push-to", "me/model-nf4")
    nf4_hub.ok("quantize", "org/model", *bound, "--adapter", adapter)
    source = ("--source", "org/model")
    nf4_hub.ok("verify", "me/model-nf4", *source, "--adapter", "org/lora", "--disk", "6MB")
    nf4_hub.fails(2, "verify", "me/model-nf4", *source, "--disk", "6MB", says=("1 adapter",))


def test_a_pickled_adapter_of_a_hub_is_refused(nf4_hub, hub, adapter, model):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    hub.add("org/pickled", adapter)
    nf4_hub.fails(
        3, "quantize", model, "out", "--adapter", "org/pickled",
        says=("no adapter_model.safetensors", "save_pretrained"),
    )  # fmt: skip


def test_a_run_that_was_stopped_wants_the_same_adapter(nf4_hub, hub, adapter, model, tmp_path):
    nf4_hub.ok("quantize", model, "whole", "--max-shard-size", "1MB", "--adapter", adapter)
    other = write_adapter(model, tmp_path / "other", 5)
    hub.faults.add(Fault(r"GET /files/.*safetensors", after=SHARDS + 12, stall=60, times=100))
    options = ("quantize", "org/model", "out", "--max-shard-size", "1MB")
    process = nf4_hub.start(*options, "--adapter", adapter)
    nf4_hub.wait_for_fault(process)
    journal = nf4_hub.work / ".out.partial" / "journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:  # weights are finished
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    hub.faults.clear()
    nf4_hub.fails(2, *options, "--resume", "--adapter", other, says=("recipe.adapters was",))
    nf4_hub.ok(*options, "--resume", "--adapter", adapter)
    whole, out = nf4_hub.work / "whole", nf4_hub.work / "out"
    assert same_files(whole, out, but=(MANIFEST, "README.md"))
