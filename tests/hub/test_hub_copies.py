"""What is fetched of a model on a Hub beside its weights, and what is never published."""

from __future__ import annotations

import json
from pathlib import Path

import blake3
import pytest
import torch
from helpers import LLAMA, llama_tensors, nf4_ok, write_checkpoint_dir
from hub_server.published import REPO
from safetensors.torch import save_file

from nf4cli.checkpoint.discovery import MANIFEST

PARTS = ("value_head.safetensors", "speech_tokenizer/model.safetensors")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with parts, a repetition of its weights, a pickle and leftovers of training."""
    root = write_checkpoint_dir(tmp_path / "src", llama_tensors(), LLAMA)
    (root / "speech_tokenizer").mkdir()
    (root / "best").mkdir()
    for name in PARTS:
        save_file({"v_head.weight": torch.ones(1, 64)}, root / name)
    (root / "best/model.safetensors").write_bytes((root / "model.safetensors").read_bytes())
    for name in ("trainer_state.json", ".env", "spk.pt", "notes.txt"):
        (root / name).write_text("{}")
    return root


def test_parts_of_a_model_on_a_hub(nf4_hub, hub, source):
    hub.add("org/parts", source)
    plan = json.loads(nf4_hub.ok("quantize", "org/parts", "--plan", "--json"))
    assert {*PARTS} <= {*plan["copied_files"]}
    assert {"best/model.safetensors", "spk.pt", ".env"} <= {*plan["left_files"]}
    assert all(r.status == 206 for r in hub.requests(r"GET /files/.*safetensors"))
    asked = ("--copy", "spk.pt", "--copy", "notes.txt")
    nf4_hub.ok("quantize", "org/parts", "out", *asked, "--push-to", REPO)
    out = nf4_hub.work / "out"
    for name in (*PARTS, "spk.pt", "notes.txt"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert name in hub.store.repos[REPO].head
    assert not (out / "best").exists()
    assert not (out / "trainer_state.json").exists()
    assert not any(r for r in hub.log if "trainer_state.json" in r.path or ".env" in r.path)
    nf4_hub.ok("verify", REPO, "--source", source)
    nf4_hub.ok("verify", REPO, "--source", "org/parts")


def test_parts_within_a_bound(nf4_hub, hub, source):
    hub.add("org/parts", source)
    asked = ("--disk", "40MB", "--push-to", REPO, "--copy", "notes.txt")
    nf4_hub.ok("quantize", "org/parts", *asked)
    assert {*PARTS, "notes.txt"} <= hub.store.repos[REPO].head.keys()
    nf4_hub.ok("verify", REPO, "--source", "org/parts", "--disk", "40MB")


def test_an_older_output_with_a_secret_is_not_published(nf4_hub, hub, source):
    out = nf4_hub.work / "out"
    nf4_ok("quantize", source, out)
    (out / ".env").write_bytes(b"TOKEN=1")
    document = json.loads((out / MANIFEST).read_text())
    digest = blake3.blake3(b"TOKEN=1").hexdigest()
    document["output"]["files"].append({"name": ".env", "size": 7, "digest": digest})
    (out / MANIFEST).write_text(json.dumps(document))
    nf4_ok("verify", out)
    nf4_hub.fails(3, "push", "out", REPO, says=("secrets: .env", "Quantize the source again"))
    assert REPO not in hub.store.repos or not hub.store.repos[REPO].head


def test_a_secret_put_into_a_finished_output_is_not_published(nf4_hub, hub, source):
    nf4_hub.ok("quantize", source, "out", "--digest", "sha256")
    (nf4_hub.work / "out" / ".env").write_text("TOKEN=1")
    nf4_hub.ok("quantize", source, "out", "--digest", "sha256", "--resume", "--push-to", REPO)
    assert "model.safetensors" in hub.store.repos[REPO].head
    assert ".env" not in hub.store.repos[REPO].head
