"""--on-nonfinite keep: weights with a NaN or an infinity stay in full precision, and are proved."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    UP,
    USAGE,
    llama_tensors,
    nf4,
    nf4_ok,
    read_all,
    refused,
    same_files,
    write_checkpoint_dir,
)

from nf4cli.checkpoint.discovery import MANIFEST

Q = "model.layers.1.self_attn.q_proj.weight"
SCHEMA = Path(__file__).parent.parent.parent / "docs" / "manifest.schema.json"
KEEP = ("--on-nonfinite", "keep")


def damaged(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A Llama with a NaN, an infinity, and a NaN in a norm, which is kept anyway."""
    tensors = llama_tensors(dtype=dtype)
    tensors[UP][100, 33] = float("nan")
    tensors[Q][0, 0] = float("-inf")
    tensors["model.norm.weight"][1] = float("nan")
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source") / "model"
    return write_checkpoint_dir(root, damaged(), LLAMA, shards=2)


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("kept") / "out"
    text = nf4_ok("quantize", source, output, *KEEP)
    assert UP in text.partition("hold a NaN or an infinity and stay in bfloat16")[0]
    assert Q in text
    return output


def records(output: Path) -> dict:
    return json.loads((output / MANIFEST).read_text())["tensors"]


def test_they_are_copied_and_named_in_skip_list_and_manifest(source, kept):
    found, stored = read_all(kept), read_all(source)
    for name in (UP, Q):
        assert torch.equal(found[name].view(torch.int16), stored[name].view(torch.int16))
        assert records(kept)[name]["rule"] == "nonfinite"
        assert "NaN or an infinity" in records(kept)[name]["reason"]
    config = json.loads((kept / "config.json").read_text())
    skip = config["quantization_config"]["llm_int8_skip_modules"]
    assert {UP.removesuffix(".weight"), Q.removesuffix(".weight")} <= set(skip)
    assert sum(r["action"] == "quantize" for r in records(kept).values()) == 12
    document = json.loads((kept / MANIFEST).read_text())
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document["recipe"]["on_nonfinite"] == "keep"


def test_it_is_proved_with_the_manifest_and_without(source, kept, tmp_path):
    assert "is good" in nf4_ok("verify", kept)
    assert "is good" in nf4_ok("verify", kept, "--source", source)
    for file in kept.iterdir():
        if file.name != MANIFEST:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "is good" in nf4_ok("verify", tmp_path, "--source", source)
    nf4_ok("dequantize", kept, tmp_path / "back")
    assert torch.isnan(read_all(tmp_path / "back")[UP]).sum() == 1


def test_transformers_loads_it(kept):
    import bitsandbytes as bnb
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(kept, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    modules = dict(model.named_modules())
    up = modules[UP.removesuffix(".weight")]
    assert type(up) is torch.nn.Linear
    assert torch.isnan(up.weight).nonzero().tolist() == [[100, 33]]
    assert torch.isinf(modules[Q.removesuffix(".weight")].weight).sum() == 1
    packed = [m for m in modules.values() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(packed) == 12
    assert all(m.weight.quant_state is not None for m in packed)
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, 512)


def test_other_dtypes_get_the_one_of_the_model(tmp_path):
    """As every kept float does: transformers 5 fails at the first forward of a mixture."""
    source = write_checkpoint_dir(tmp_path / "src", damaged(torch.float32), LLAMA)
    nf4_ok("quantize", source, tmp_path / "out", *KEEP)
    found = read_all(tmp_path / "out")[UP]
    assert found.dtype == torch.bfloat16
    assert torch.isnan(found).nonzero().tolist() == [[100, 33]]
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


@pytest.mark.parametrize("options", [(), ("--on-nonfinite", "error")])
def test_the_default_refuses_and_names_the_option(work, options):
    write_checkpoint_dir(work / "model", damaged(), LLAMA)
    refused(
        INPUT, "quantize", "model", "-q", *options,
        says=(f"{UP}[100, 33]", "--on-nonfinite keep"), cwd=work,
    )  # fmt: skip


def test_what_cannot_be_asked_for(work):
    refused(USAGE, "quantize", "model", "--on-nonfinite", "drop", says=("error, keep",), cwd=work)
    refused(USAGE, "quantize", "model", "model", *KEEP, says=("source directory",), cwd=work)


def test_a_model_of_nothing_else_has_nothing_to_quantize(work):
    tensors = llama_tensors()
    for name, value in tensors.items():
        if "proj" in name:
            value[-1, -1] = float("inf")
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    refused(
        INPUT, "quantize", "model", *KEEP, "-q",
        says=("no linear layer to quantize", "14 x holds a NaN"), cwd=work,
    )  # fmt: skip


def test_a_finite_model_comes_out_the_same(llama, llama_nf4, tmp_path):
    nf4_ok("quantize", llama, tmp_path / "out", *KEEP)
    assert same_files(llama_nf4, tmp_path / "out", but=(MANIFEST, "README.md"))
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", llama)


def test_the_plan_has_looked_too(source, kept, tmp_path):
    plan = json.loads(nf4_ok("quantize", source, tmp_path / "out", *KEEP, "--plan", "--json"))
    sizes = {file["name"]: file["bytes"] for file in plan["files"]}
    assert sizes == {file.name: file.stat().st_size for file in kept.glob("*.safetensors")}
    assert {t["name"] for t in plan["tensors"] if t["rule"] == "nonfinite"} == {UP, Q}
    assert not (tmp_path / "out").exists()


def test_a_weight_kept_as_not_finite_that_is_finite_is_found(kept, tmp_path):
    """The proof looks again: a record that says so excuses nothing."""
    tensors = damaged()
    tensors[Q][0, 0] = 0.1
    source = write_checkpoint_dir(tmp_path / "repaired", tensors, LLAMA, shards=2)
    done = nf4("verify", kept, "--source", source)
    assert done.returncode == 1
    assert f"{Q} is BF16 [64, 64]: the source gives U8" in done.stdout
    tensors[Q][0, 0] = float("-inf")  # and one that only the source has
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    source = write_checkpoint_dir(tmp_path / "worse", tensors, LLAMA, shards=2)
    done = nf4("verify", kept, "--source", source)
    assert done.returncode == 1
    assert "model.layers.1.mlp.up_proj.weight is U8" in done.stdout


def test_what_loaders_take_for_the_same_is_kept_with_it(tmp_path):
    """transformers 5 takes an entry `lift` to mean `uplift`, too."""
    tensors = llama_tensors()
    tensors["lift.weight"], tensors["uplift.weight"] = (tensors[UP].clone() for _ in range(2))
    tensors["lift.weight"][0, 0] = float("nan")
    source = write_checkpoint_dir(tmp_path / "src", tensors, LLAMA)
    text = nf4_ok("quantize", source, tmp_path / "out", *KEEP)
    rules = {name: record["rule"] for name, record in records(tmp_path / "out").items()}
    assert (rules["lift.weight"], rules["uplift.weight"]) == ("nonfinite", "entangled")
    assert "uplift.weight" in text.partition("as loaders take them for the same, ")[2]
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_what_vllm_loads_as_one_is_kept_with_it(source, tmp_path):
    nf4_ok("quantize", source, tmp_path / "out", *KEEP, "--target", "vllm")
    rules = {name: record["rule"] for name, record in records(tmp_path / "out").items()}
    fused = {name for name, rule in rules.items() if rule == "fused-with"}
    assert fused == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    }
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_a_layer_that_is_stored_transposed(tmp_path):
    weights = {f"h.{i}.attn.c_attn.weight": torch.ones(64, 192) for i in range(2)}
    weights["h.1.attn.c_attn.weight"][5, 77] = float("nan")
    source = write_checkpoint_dir(tmp_path / "gpt2", weights, {"model_type": "gpt2"})
    nf4_ok("quantize", source, tmp_path / "out", *KEEP)
    found = read_all(tmp_path / "out")["h.1.attn.c_attn.weight"]
    assert torch.isnan(found).nonzero().tolist() == [[5, 77]]
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)
