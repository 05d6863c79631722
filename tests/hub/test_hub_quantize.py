"""Models of a Hub: what is fetched, what is recorded, and the bound on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import nf4_ok, same_files
from hub_server import Fault
from hub_server.fixtures import SHARDS, Watch, bytes_in
from schemas import document

WEIGHTS = r"GET /files/.*safetensors"
PUSH = ("--push-to", "me/model-nf4", "--max-shard-size", "1MB")


def manifest_without_origin(path):
    document = json.loads(path.read_text())
    origin = {key: document["source"].pop(key) for key in ("repo", "commit")}
    return document, origin


def test_the_output_is_that_of_a_local_run(nf4_hub, hub, converted):
    nf4_hub.ok("quantize", "org/model", "out", "--max-shard-size", "1MB")
    out = nf4_hub.work / "out"
    assert same_files(out, converted, but=("nf4_manifest.json", "README.md"))
    there, origin = manifest_without_origin(out / "nf4_manifest.json")
    assert origin == {"repo": "org/model", "commit": hub.store.repos["org/model"].branches["main"]}
    assert there == json.loads((converted / "nf4_manifest.json").read_text())


def test_a_plan_reads_headers_only(nf4_hub, hub, model, converted):
    plan = json.loads(nf4_hub.ok("quantize", "org/model", "--plan", "--json"))
    local = json.loads(nf4_ok("quantize", model, "--plan", "--json"))
    different = {"hub", "source", "output", "left_files"}
    assert {k: v for k, v in plan.items() if k not in different} == {
        k: v for k, v in local.items() if k not in different
    }
    sizes = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    assert plan["hub"]["fetch_bytes"] == plan["source_bytes"] == sizes
    assert plan["hub"]["convert_bytes_per_second"] > 0
    requests = hub.requests(WEIGHTS)
    assert len(requests) == SHARDS
    assert all(r.status == 206 and r.range == "bytes=0-65535" for r in requests)
    assert not list(nf4_hub.work.iterdir())


def test_a_header_that_is_longer_than_the_first_look(nf4_hub, hub, tmp_path):
    import torch
    from helpers import LLAMA, llama_tensors, write_checkpoint_dir

    tensors = {**llama_tensors(), **{f"extra.{'x' * 200}.{i}": torch.zeros(1) for i in range(400)}}
    hub.add("org/long", write_checkpoint_dir(tmp_path / "long", tensors, LLAMA))
    nf4_hub.ok("quantize", "org/long", "--plan")
    _, second = hub.requests(WEIGHTS)
    assert second.range is not None
    assert second.range.startswith("bytes=65536-")
    assert second.sent < 100_000


def test_only_what_is_needed_is_fetched(nf4_hub, hub):
    nf4_hub.ok("quantize", "org/model", "out", "--disk", "40MB")
    names = {r.path.split("?")[0].rsplit("/", 1)[1] for r in hub.requests("GET .*(resolve|files)/")}
    assert "pytorch_model.bin" not in names
    assert ".gitattributes" not in names
    assert {"config.json", "tokenizer.json"} <= names


def test_tokens_do_not_go_to_where_the_bytes_are(nf4_hub, hub):
    nf4_hub.ok("quantize", "org/model", "out", "--disk", "40MB", *PUSH)
    assert all(r.authorized for r in hub.log if not r.cdn and "/api/models/" in r.path)
    assert not any(r.authorized for r in hub.log if r.cdn)


@pytest.mark.parametrize("leaving", [False, True])
def test_the_bound_holds_for_a_model_that_is_five_times_as_large(nf4_hub, hub, converted, leaving):
    """The directory is watched from outside; sizes count whole, reserved room included."""
    files = hub.store.repos["org/model"].head.items()
    size = sum(f.size for n, f in files if n.endswith(".safetensors"))
    output = sum(p.stat().st_size for p in converted.glob("*.safetensors"))
    limit = size // 5 if leaving else output + size // 5
    target = () if leaving else ("out",)
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok("quantize", "org/model", *target, "--disk", str(limit), *PUSH)
    assert watch.looks > 20
    assert 0.3 * limit < watch.most <= limit
    pushed = hub.store.repos["me/model-nf4"].head
    for path in converted.glob("*.safetensors"):
        assert pushed[path.name].place.read_bytes() == path.read_bytes()
    left = sorted(p.name for p in nf4_hub.work.iterdir())
    assert left == ([] if leaving else ["out"])
    if not leaving:
        assert same_files(nf4_hub.work / "out", converted, but=("nf4_manifest.json", "README.md"))
    assert sum(r.sent for r in hub.requests(WEIGHTS) if r.range is None) == size


def test_the_smallest_bound_is_named_and_works(nf4_hub, hub):
    plan = json.loads(nf4_hub.ok("quantize", "org/model", "--plan", "--json", *PUSH))
    need = plan["hub"]["smallest_disk_bytes_when_pushed"]
    nf4_hub.fails(
        2, "quantize", "org/model", "--disk", need - 1, *PUSH,
        says=(f"--disk {need - 1:,} bytes is too little", f"{-(-need // 10**6)}MB"),
    )  # fmt: skip
    assert "me/model-nf4" not in hub.store.repos
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok("quantize", "org/model", "--disk", need, *PUSH)
    assert watch.most <= need


def test_stacks_of_experts_that_lie_in_several_files(nf4_hub, hub, tmp_path):
    """A source file leaves the disk when its experts are read, though no stack is complete."""
    import torch
    from helpers import LLAMA, llama_tensors, write_checkpoint_dir

    tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    for expert in range(12):
        for leaf, shape in (("gate", (256, 64)), ("up", (256, 64)), ("down", (64, 256))):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}_proj.weight"
            seed = torch.Generator().manual_seed(len(tensors))
            tensors[name] = (torch.randn(*shape, generator=seed) * 0.1).bfloat16()
    config = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 12}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config, shards=6)
    hub.add("org/mixture", source)
    words = ("quantize", "org/mixture", *PUSH, "--target", "unsloth")
    plan = json.loads(nf4_hub.ok(*words, "--plan", "--json"))
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok(*words, "--disk", plan["hub"]["smallest_disk_bytes_when_pushed"])
    assert watch.most <= plan["hub"]["smallest_disk_bytes_when_pushed"]
    nf4_ok("quantize", source, tmp_path / "local", "--target", "unsloth", *PUSH[2:])
    pushed = hub.store.repos["me/model-nf4"].head
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert pushed[path.name].place.read_bytes() == path.read_bytes()


def test_the_cache_is_used_and_kept(nf4_hub, hub):
    nf4_hub.ok("quantize", "org/model", "first")
    once = hub.sent(WEIGHTS)
    hub.log.clear()
    nf4_hub.ok("quantize", "org/model", "second")
    nf4_hub.ok("quantize", "org/model", "third", "--disk", "20MB")
    assert hub.sent(WEIGHTS) == 0 < once
    assert same_files(nf4_hub.work / "first", nf4_hub.work / "second")
    assert same_files(nf4_hub.work / "first", nf4_hub.work / "third")
    hub.log.clear()
    nf4_hub.ok("quantize", "org/model", "offline", HF_HUB_OFFLINE="1")
    assert not hub.log
    assert same_files(nf4_hub.work / "first", nf4_hub.work / "offline")


def test_a_damaged_cache_is_noticed_and_mended(nf4_hub):
    nf4_hub.ok("quantize", "org/model", "first")
    blob = next(p for p in (nf4_hub.home / "hub").rglob("blobs/*") if p.stat().st_size > 10**6)
    data = bytearray(blob.read_bytes())
    data[500_000] ^= 1
    blob.write_bytes(data)
    says = ("in the cache, has another digest", "HF_HUB_OFFLINE forbids")
    nf4_hub.fails(4, "quantize", "org/model", "offline", says=says, HF_HUB_OFFLINE="1")
    nf4_hub.fails(4, "verify", "org/model", says=says, HF_HUB_OFFLINE="1")
    done = nf4_hub("quantize", "org/model", "second")
    assert done.returncode == 0
    assert "has another digest" in done.stderr
    assert same_files(nf4_hub.work / "first", nf4_hub.work / "second")


def test_other_commands_take_names_of_a_hub_and_call_models_by_them(nf4_hub, hub):
    nf4_hub.ok("quantize", "org/model", "--push-to", "me/model-nf4")
    here = f"me/model-nf4@{hub.store.repos['me/model-nf4'].branches['main']}"
    found = nf4_hub("verify", "me/model-nf4", "--source", "org/model", "--junit", "junit.xml")
    assert found.stdout.endswith(f"{here} is good\n")
    source = f"org/model@{hub.store.repos['org/model'].branches['main']}"
    assert f"verifying {here} against {source}" in found.stderr
    assert f'name="{here}"' in (nf4_hub.work / "junit.xml").read_text()
    assert nf4_hub.ok("inspect", "me/model-nf4").startswith(here)
    nf4_hub.ok("dequantize", "me/model-nf4", "back")
    assert (nf4_hub.work / "back" / "config.json").exists()


def test_revisions(nf4_hub, hub, model, tmp_path):
    repo = hub.store.repos["org/model"]
    first = repo.branches["main"]
    repo.branches["v1.0"] = first
    repo.commit({n: f for n, f in repo.head.items() if n != "tokenizer.json"}, "second")
    for revision, commit in ((first, first), ("v1.0", first), ("main", repo.branches["main"])):
        out = f"out-{revision}"
        nf4_hub.ok("quantize", f"org/model@{revision}", out)
        document = json.loads((nf4_hub.work / out / "nf4_manifest.json").read_text())
        assert document["source"]["commit"] == commit
    nf4_hub.fails(3, "quantize", "org/model@nope", says=("no such branch, tag or commit",))


def test_a_branch_that_moves_in_mid_run(nf4_hub, hub):
    """The commit was resolved once: what the branch is later does not matter, nor with --resume."""
    repo = hub.store.repos["org/model"]
    first = repo.branches["main"]
    hub.rate = 20e6
    process = nf4_hub.start("quantize", "org/model", "out", "--disk", "40MB")
    while hub.sent(WEIGHTS) < 10**7:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    broken = {n: hub.store.file(n, b"broken") for n in repo.head}
    repo.commit(broken, "second")
    hub.rate = None
    done = nf4_hub("quantize", "org/model", "out", "--disk", "40MB", "--resume")
    assert done.returncode == 0, done.stderr
    assert "continuing with the commit that the run began with" in done.stderr
    document = json.loads((nf4_hub.work / "out" / "nf4_manifest.json").read_text())
    assert document["source"]["commit"] == first


def test_what_needs_all_at_once_goes_through_the_cache(nf4_hub, converted):
    options = ("--on-nonfinite", "keep")
    nf4_hub.fails(
        2, "quantize", "org/model", "out", "--disk", "40MB", *options,
        says=("--disk does not go with --on-nonfinite keep",),
    )  # fmt: skip
    nf4_hub.ok("quantize", "org/model", "out", *options, "--max-shard-size", "1MB")
    names = ("nf4_manifest.json", "README.md")
    assert same_files(nf4_hub.work / "out", converted, but=names)


@pytest.mark.parametrize(
    ("setting", "token", "code", "says"),
    [
        ("private", None, 3, ("private", "HF_TOKEN")),
        ("private", "hf_read", 0, ()),
        ("gated", None, 3, ("gated", "accept its terms")),
        ("gated", "hf_read", 0, ()),
        ("", "hf_wrong", 3, ("HF_TOKEN",)),
        ("", None, 0, ()),
    ],
)
def test_who_may_read(nf4_hub, hub, setting, token, code, says):
    if setting:
        setattr(hub.store.repos["org/model"], setting, True)
    if code:
        nf4_hub.fails(code, "quantize", "org/model", "out", says=says, token=token)
        assert not list(nf4_hub.work.iterdir())
    else:
        nf4_hub.ok("quantize", "org/model", "out", token=token)


def test_what_is_wrong_here_is_said_before_anybody_is_asked(nf4_hub, hub):
    word = ("quantize", "org/model", "out")
    nf4_hub.fails(2, *word, says=("HF_ENDPOINT is 'hub'",), HF_ENDPOINT="hub")
    nf4_hub.fails(2, *word, says=("HF_ENDPOINT is 'http://'",), HF_ENDPOINT="http://")
    nf4_hub.fails(2, *word, "--disk", "10XB", says=("--disk '10XB' is not a size",))
    for name in ("a/b/c", "me/x@y", "me/..", " ", "me/x y"):
        says = (f"{name!r} is no name of a repository",)
        nf4_hub.fails(2, *word, "--push-to", name, says=says)
        nf4_hub.fails(2, "push", "out", name, says=says)
    assert not hub.log
    nf4_hub.fails(2, *word, says=("no token has ('ü')", "HF_TOKEN"), token="hf_ü")
    assert not list(nf4_hub.work.iterdir())


def test_names_that_are_no_models(nf4_hub, hub, tmp_path):
    nf4_hub.fails(3, "quantize", "org/nothing", says=("is no path here", "HF_TOKEN"))
    (nf4_hub.work / "org" / "model").mkdir(parents=True)
    nf4_hub.fails(3, "quantize", "org/model", says=("not a safetensors checkpoint",))
    assert not hub.requests("/files/")
    shutil.rmtree(nf4_hub.work / "org")
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x" * 100})
    hub.add("org/empty", {})
    for name in ("org/pickled", "org/empty"):
        for command in ("quantize", "verify", "inspect"):
            says = f"error: {name} is not a safetensors checkpoint: it has no .safetensors file"
            nf4_hub.fails(3, command, name, says=(says,))
    hub.add("org/evil", {"config.json": b"{}", "../../evil.json": b"{}"})
    nf4_hub.fails(3, "quantize", "org/evil", says=("leads out of its directory",))
    assert not list(tmp_path.rglob("evil.json"))


def test_a_lie_about_a_digest_is_no_conversion(nf4_hub, hub, model):
    name = "model-00003-of-00024.safetensors"
    repo = hub.store.repos["org/model"]
    repo.head[name] = hub.store.file(name, model / name, sha256="0" * 64)
    stderr = nf4_hub.fails(
        3, "quantize", "org/model", "out", "--disk", "40MB",
        says=(name, "3 times with another digest", "0" * 64),
    )  # fmt: skip
    assert stderr.count("wrong digest: fetching it again") == 2
    assert not (nf4_hub.work / "out").exists()


def test_local_sources_are_pushed_within_a_bound(nf4_hub, hub, model, converted):
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok("quantize", model, "--disk", "4MB", *PUSH)
    assert watch.most <= 4_000_000
    assert not list(nf4_hub.work.iterdir())
    pushed = hub.store.repos["me/model-nf4"].head
    for path in converted.glob("*.safetensors"):
        assert pushed[path.name].place.read_bytes() == path.read_bytes()
    assert bytes_in(model) > 5 * 4_000_000


def test_a_stalled_link_is_no_reason_to_wait_for_ever(nf4_hub, hub):
    hub.faults.add(Fault(r"GET /files/.*00005-of", after=1, stall=60))
    started = time.monotonic()
    nf4_hub.ok("quantize", "org/model", "out", "--disk", "40MB", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert time.monotonic() - started < 30


def test_what_is_published_already_is_not_made_again(nf4_hub, hub):
    """A job that passes --resume may run again, and again."""
    arguments = ("quantize", "org/model", "--disk", "10MB", *PUSH, "--resume")
    nf4_hub.ok(*arguments)
    repo = hub.store.repos["me/model-nf4"]
    hub.log.clear()
    done = nf4_hub(*arguments)
    assert done.returncode == 0, done.stderr
    assert "me/model-nf4 has this already" in done.stderr
    assert len(repo.commits) == 2
    assert not hub.requests("PUT ")
    assert not [r for r in hub.requests("GET /files/org") if r.range != "bytes=0-65535"]
    nf4_hub.ok(*arguments, "--blocksize", "128")
    assert len(repo.commits) == 3
    nf4_hub.ok(*arguments)
    assert len(repo.commits) == 4


def test_what_lies_here_is_in_nobodys_way(nf4_hub, hub):
    """A run whose output leaves has no use for the place that another one's output has."""
    other = nf4_hub.work / "model-nf4"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    hub.rate = 20e6
    process = nf4_hub.start("quantize", "org/model", "--disk", "10MB", *PUSH)
    while hub.sent(WEIGHTS) < 2 * 10**7:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    assert {p.name for p in nf4_hub.work.iterdir()} == {
        "model-nf4", ".models--me--model-nf4.partial"
    }  # fmt: skip
    hub.rate = None
    done = nf4_hub("quantize", "org/model", "--disk", "10MB", *PUSH, "--resume", "--json")
    assert "weights are there" in done.stderr
    assert document(done.stdout, "quantize")["output"] is None
    assert [p.name for p in nf4_hub.work.rglob("*")] == ["model-nf4", "thesis.tex"]


def test_a_card_that_is_there_stays_unless_it_is_to_be_replaced(nf4_hub, hub):
    nf4_hub.ok("quantize", "org/model", *PUSH)
    repo = hub.store.repos["me/model-nf4"]
    ours = repo.head["README.md"]
    repo.commit({**repo.head, "README.md": hub.store.file("README.md", b"theirs")}, "edited")
    done = nf4_hub("quantize", "org/model", *PUSH, "--blocksize", "128")
    assert "me/model-nf4 keeps its README.md; --replace-card" in done.stderr
    assert repo.head["README.md"].place.read_bytes() == b"theirs"
    again = ("quantize", "org/model", *PUSH, "--blocksize", "128", "--replace-card")
    done = nf4_hub(*again, "--resume")
    assert "its README.md stays as well" in done.stderr, "nothing else would be sent"
    assert repo.head["README.md"].place.read_bytes() == b"theirs"
    nf4_hub.ok(*again)
    card = repo.head["README.md"].place.read_text()
    assert card.splitlines()[:3] == ours.place.read_text().splitlines()[:3]
    assert "blocks of 128" in card
    nf4_hub.fails(2, "quantize", "org/model", "o", "--replace-card", says=("needs --push-to",))


def test_pipelines(nf4_hub, hub, pipe):
    source = pipe
    hub.add("org/flux", source)
    plan = json.loads(nf4_hub.ok("quantize", "org/flux", "--plan", "--json"))
    assert plan["components"]
    assert not [r for r in hub.requests(WEIGHTS) if r.range is None]
    nf4_hub.ok("quantize", "org/flux", "--push-to", "me/flux-nf4")
    nf4_hub.ok("quantize", source, "local", "--digest", "sha256")
    pushed = hub.store.repos["me/flux-nf4"].head
    for path in (nf4_hub.work / "local").rglob("*.safetensors"):
        name = path.relative_to(nf4_hub.work / "local").as_posix()
        assert pushed[name].place.read_bytes() == path.read_bytes()
    part = next(iter(plan["components"]))
    manifest = json.loads(pushed[f"{part}/nf4_manifest.json"].place.read_text())
    assert manifest["source"]["repo"] == "org/flux"
    nf4_hub.ok("verify", "me/flux-nf4", "--source", "org/flux")


@pytest.mark.parametrize("options", [(), ("--disk", "40MB"), ("--plan",)])
def test_the_oldest_huggingface_hub(nf4_hub, hub, converted, options):
    """transformers 4 needs a version before 1.0, which speaks another HTTP library's language."""
    python = os.environ.get("NF4_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("NF4_TRANSFORMERS4_PYTHON names no interpreter with huggingface_hub below 1.0")
    # What that environment lacks comes from ours, which is looked at last.
    ours = Path(importlib.util.find_spec("nf4cli").origin).parents[1]
    arguments = ["nf4", "quantize", "org/model", "out", "--max-shard-size", "1MB", *options]
    code = (
        f"import sys; sys.path.append({str(ours)!r}); sys.argv = {arguments!r}\n"
        "import huggingface_hub; print(huggingface_hub.__version__, file=sys.stderr)\n"
        "from nf4cli.cli import main; main()"
    )
    hub.faults.add(Fault(r"GET /files/.*00007-of", after=1, cut=700_000))
    hub.faults.add(Fault(r"GET /files/.*00009-of", after=1, status=503))
    done = subprocess.run(
        [python, "-c", code], env=hub.environment(nf4_hub.home), cwd=nf4_hub.work,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("0.")
    if options != ("--plan",):
        assert hub.faults.seen == 2
        assert same_files(nf4_hub.work / "out", converted, but=("nf4_manifest.json", "README.md"))
