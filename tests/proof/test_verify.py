"""verify catches what loaders do not notice, and says what it could not check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import blake3
import numpy as np
import pytest
import torch
from helpers import LLAMA, llama_tensors, nf4, nf4_ok, read_all, write_checkpoint_dir
from safetensors import safe_open
from safetensors.torch import save_file

from nf4cli.api.machine import Machine
from nf4cli.api.verifying import Check, check
from nf4cli.checkpoint.discovery import MANIFEST

UP = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.fixture
def copy(llama_nf4: Path, tmp_path: Path) -> Path:
    """A good output that a test may damage."""
    return Path(shutil.copytree(llama_nf4, tmp_path / "copy"))


def resave(root: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {k: t.clone() for k, t in read_all(root).items()}
    change(tensors)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def edit_config(root: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((root / "config.json").read_text())
    change(config)
    (root / "config.json").write_text(json.dumps(config))


def edit_manifest(root: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def edit_state(tensors: dict[str, torch.Tensor], **fields: object) -> None:
    state = json.loads(tensors[UP + STATE].numpy().tobytes()) | fields
    blob = json.dumps(state).encode()
    tensors[UP + STATE] = torch.from_numpy(np.frombuffer(blob, np.uint8).copy())


def swap(tensors: dict[str, torch.Tensor], suffix: str) -> None:
    tensors[UP + suffix], tensors[OTHER + suffix] = tensors[OTHER + suffix], tensors[UP + suffix]


def zero(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = torch.zeros_like(tensors[key])


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    # name: (the least it takes to notice, what is done)
    "absmax dropped": ("alone", lambda d: resave(d, lambda t: t.pop(UP + ".absmax"))),
    "nested_absmax dropped": ("alone", lambda d: resave(d, lambda t: t.pop(UP + ".nested_absmax"))),
    "quant_state dropped": ("alone", lambda d: resave(d, lambda t: t.pop(UP + STATE))),
    "packed weight dropped": ("alone", lambda d: resave(d, lambda t: t.pop(UP))),
    "wrong blocksize": ("alone", lambda d: resave(d, lambda t: edit_state(t, blocksize=128))),
    "wrong shape": ("alone", lambda d: resave(d, lambda t: edit_state(t, shape=[128, 65]))),
    "shape transposed": ("manifest", lambda d: resave(d, lambda t: edit_state(t, shape=[64, 128]))),
    "wrong dtype": ("manifest", lambda d: resave(d, lambda t: edit_state(t, dtype="float16"))),
    "not JSON": ("alone", lambda d: resave(d, lambda t: zero(t, UP + STATE))),
    "quant_map changed": ("alone", lambda d: resave(d, lambda t: zero(t, UP + ".quant_map"))),
    "nested map changed": (
        "alone",
        lambda d: resave(d, lambda t: zero(t, UP + ".nested_quant_map")),
    ),
    "NaN statistics": (
        "alone",
        lambda d: resave(d, lambda t: t[UP + ".nested_absmax"].fill_(float("nan"))),
    ),
    "companions swapped": ("manifest", lambda d: resave(d, lambda t: swap(t, ".absmax"))),
    "weights swapped": ("manifest", lambda d: resave(d, lambda t: swap(t, ""))),
    "packed run zeroed": ("manifest", lambda d: resave(d, lambda t: t[UP][10:200].fill_(0x77))),
    "kept tensor changed": (
        "manifest",
        lambda d: resave(d, lambda t: t["model.norm.weight"].mul_(1.5)),
    ),
    "tensor renamed": (
        "manifest",
        lambda d: resave(d, lambda t: t.update({"model.norm2.weight": t.pop("model.norm.weight")})),
    ),
    "truncated file": (
        "alone",
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-100]
        ),
    ),
    "config loads as fp4": (
        "alone",
        lambda d: edit_config(d, lambda c: c["quantization_config"].pop("bnb_4bit_quant_type")),
    ),
    "config without quantization": (
        "alone",
        lambda d: edit_config(d, lambda c: c.pop("quantization_config")),
    ),
    "skip list without the head": (
        "alone",
        lambda d: edit_config(
            d, lambda c: c["quantization_config"].update(llm_int8_skip_modules=["x"])
        ),
    ),
    "skip list over a packed module": (
        "alone",
        lambda d: edit_config(
            d, lambda c: c["quantization_config"]["llm_int8_skip_modules"].append("up_proj")
        ),
    ),
    "config of another model": (
        "source",
        lambda d: edit_config(d, lambda c: c.update(num_attention_heads=8)),
    ),
    "tokenizer changed": ("manifest", lambda d: (d / "tokenizer.json").write_text("[]")),
    "tokenizer deleted": ("manifest", lambda d: (d / "tokenizer.json").unlink()),
    "config deleted": ("manifest", lambda d: (d / "config.json").unlink()),
    "config also loads in 8 bit": (
        "alone",
        lambda d: edit_config(d, lambda c: c["quantization_config"].update(load_in_8bit=True)),
    ),
    "config of another storage": (
        "alone",
        lambda d: edit_config(
            d, lambda c: c["quantization_config"].update(bnb_4bit_quant_storage="float32")
        ),
    ),
    "compute dtype changed": (
        "manifest",
        lambda d: edit_config(
            d, lambda c: c["quantization_config"].update(bnb_4bit_compute_dtype="float16")
        ),
    ),
    "key added to config": ("manifest", lambda d: edit_config(d, lambda c: c.update(rope_theta=1))),
    "two states": (
        "alone",
        lambda d: resave(d, lambda t: t.update({UP + STATE[:-3] + "fp4": t[UP + STATE].clone()})),
    ),
    "absurd shape": (
        "alone",
        lambda d: resave(d, lambda t: edit_state(t, shape=[10**9] * 1000)),
    ),
    "nested_dtype": (
        "alone",
        lambda d: resave(d, lambda t: edit_state(t, nested_dtype="bfloat16")),
    ),
    "manifest edited: error": (
        "source",
        lambda d: edit_manifest(d, lambda m: m["tensors"][UP]["error"].update(rel_rmse=0.01)),
    ),
    "manifest edited: source": (
        "source",
        lambda d: edit_manifest(d, lambda m: m["source"].update(files=[])),
    ),
    "manifest edited: digest": (
        "manifest",
        lambda d: edit_manifest(d, lambda m: m["output"]["files"][-1].update(digest="00")),
    ),
    "extra shard": (
        "manifest",
        lambda d: (
            (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"),
            save_file({"stale": torch.zeros(2)}, d / "model-00002-of-00002.safetensors"),
        ),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name, copy, llama):
    least, damage = DAMAGE[name]
    damage(copy)
    levels = ["alone", "manifest", "source"]
    for level in levels[levels.index(least) :]:
        arguments = ["--source", llama] if level == "source" else []
        manifest = copy / MANIFEST
        text = manifest.read_text()
        if level == "alone":
            manifest.unlink()
        done = nf4("verify", copy, *arguments)
        manifest.write_text(text)
        assert done.returncode == 1, f"{level}: {done.stdout}{done.stderr}"
        assert "NOT good" in done.stdout


def test_without_a_manifest_the_source_alone_proves_it(copy, llama):
    (copy / MANIFEST).unlink()
    text = nf4_ok("verify", copy, "--source", llama)
    assert "not checked" in text
    resave(copy, lambda t: t[UP][77].fill_(0))
    done = nf4("verify", copy, "--source", llama)
    assert done.returncode == 1
    assert f"{UP} in model.safetensors: byte 77 (elements 154 and 155)" in done.stdout


def test_a_state_of_another_length_is_compared_by_its_meaning(copy, llama):
    def unpad(tensors: dict[str, torch.Tensor]) -> None:
        edit_state(tensors)  # json.dumps of the same fields: shorter, and as good

    resave(copy, unpad)
    (copy / MANIFEST).unlink()
    nf4_ok("verify", copy, "--source", llama)
    resave(copy, lambda t: edit_state(t, shape=[64, 128]))
    done = nf4("verify", copy, "--source", llama)
    assert done.returncode == 1
    assert f"{UP}{STATE} is" in done.stdout


def test_no_complete_state_and_no_manifest(copy, llama):
    def break_all(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.endswith(".absmax")]:
            del tensors[key]

    resave(copy, break_all)
    (copy / MANIFEST).unlink()
    done = nf4("verify", copy, "--source", llama)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_another_source_is_named(llama_nf4, tmp_path):
    other = write_checkpoint_dir(tmp_path / "other", llama_tensors(seed=1), LLAMA)
    done = nf4("verify", llama_nf4, "--source", other)
    assert done.returncode == 1
    assert "is not the file that this was made from" in done.stdout


def test_experts_left_out_are_noticed(tmp_path, llama):
    nf4_ok("quantize", llama, tmp_path / "out", "--keep", "mlp")
    nf4_ok("verify", tmp_path / "out", "--source", llama)
    (tmp_path / "out" / MANIFEST).unlink()
    edit_config(
        tmp_path / "out",
        lambda c: c["quantization_config"].update(llm_int8_skip_modules=["lm_head"]),
    )
    done = nf4("verify", tmp_path / "out")
    assert done.returncode == 1
    assert "expect it in 4 bit" in done.stdout


def test_shards_without_their_index(tmp_path):
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1000, 1024).bfloat16() for i in range(4)
    }
    source = write_checkpoint_dir(tmp_path / "src", tensors, {**LLAMA, "num_hidden_layers": 4})
    nf4_ok("quantize", source, tmp_path / "out", "--max-shard-size", "1.2MB")
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    (tmp_path / "out" / MANIFEST).unlink()
    done = nf4("verify", tmp_path / "out")
    assert done.returncode == 1
    assert "loaders cannot find the shards" in done.stdout


def test_a_large_index_is_read(tmp_path):
    """That of DeepSeek-V3 for vLLM has 57 MB; only the digest of this one is another."""
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"] = torch.randn(16384, 64).bfloat16()
    config = {**LLAMA, "vocab_size": 16384, "tie_word_embeddings": True}
    llama, out = write_checkpoint_dir(tmp_path / "llama", tensors, config), tmp_path / "out"
    nf4_ok("quantize", llama, out, "--max-shard-size", "1MB", "-q")
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text() + " " * 60_000_000)
    done = nf4("verify", out, "--source", llama, "--json")
    findings = json.loads(done.stdout)["findings"]
    assert [finding["level"] for finding in findings] == ["manifest"]


def test_an_edited_model_card_is_no_damage(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "src"))
    (source / "README.md").write_text("card")
    out = tmp_path / "out"
    nf4_ok("quantize", source, out)
    plain = nf4_ok("verify", out, "--source", source)
    assert "README" not in plain
    assert "README" not in (out / MANIFEST).read_text()
    for content in ("another card", "---\n- [", None):
        (out / "README.md").unlink()
        if content is not None:
            (out / "README.md").write_text(content)
        assert nf4_ok("verify", out, "--source", source) == plain


def test_an_edited_model_card_of_an_earlier_version(llama_nf4, tmp_path):
    """nf4 0.2 copied the source's card and listed it."""
    out = Path(shutil.copytree(llama_nf4, tmp_path / "out"))
    (out / "README.md").write_text("card")
    manifest = json.loads((out / MANIFEST).read_text())
    digest = blake3.blake3(b"card").hexdigest()
    manifest["output"]["files"].append({"name": "README.md", "size": 4, "digest": digest})
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert "README" not in nf4_ok("verify", out)
    (out / "README.md").write_text("another card")
    assert "README.md: it was edited" in nf4_ok("verify", out)


def test_json(llama_nf4, copy):
    good = json.loads(nf4_ok("verify", llama_nf4, "--json"))
    assert good["ok"] is True
    assert good["findings"] == []
    assert any("--source" in sentence for sentence in good["unchecked"])
    resave(copy, lambda t: swap(t, ".absmax"))
    done = nf4("verify", copy, "--json")
    bad = json.loads(done.stdout)
    assert done.returncode == 1
    assert {f["where"] for f in bad["findings"]} >= {UP + ".absmax", OTHER + ".absmax"}


def test_nothing_to_verify(llama, tmp_path):
    assert nf4("verify", llama).returncode == 3
    assert nf4("verify", tmp_path).returncode == 3
    assert nf4("verify", tmp_path / "absent").returncode == 3


def test_a_bound_on_memory_parses_no_header_again(llama, llama_nf4, monkeypatch):
    parsed = []

    def counted(path, *rest, **options):
        parsed.append(path)
        return safe_open(path, *rest, **options)

    monkeypatch.setattr("safetensors.safe_open", counted)
    times = []
    for memory in (None, 200_000_000):
        parsed.clear()
        machine = Machine(name="cpu", workers=1, memory=memory)
        assert check(Check(llama_nf4, llama, machine=machine)).ok
        times.append(len(parsed))
    assert times[0] == times[1] > 0
