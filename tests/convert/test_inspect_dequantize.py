"""inspect and dequantize through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import (
    LLAMA,
    bnb_dequantize,
    nf4,
    nf4_ok,
    read_all,
    same_files,
    write_checkpoint_dir,
)

UP = "model.layers.0.mlp.up_proj"


def test_inspect_adds_up(llama, llama_nf4):
    seen = json.loads(nf4_ok("inspect", llama_nf4, "--json"))
    source = read_all(llama)
    assert seen["parameters"] == sum(t.numel() for t in source.values())
    out = read_all(llama_nf4)
    nbytes = sum(t.numel() * t.element_size() for t in out.values())
    assert sum(g["nbytes"] for g in seen["groups"]) == nbytes
    assert seen["bits_per_weight"] == pytest.approx(8 * nbytes / seen["parameters"])
    assert seen["problems"] == []
    assert len(seen["errors"]) == 14


def test_inspect_a_full_precision_checkpoint(llama):
    text = nf4_ok("inspect", llama)
    assert "0.0% in 4 bit, 16.00 bits a weight" in text
    assert "not in 4 bit" in nf4_ok("inspect", llama, UP)


def test_inspect_a_tensor_counts_every_code(tmp_path):
    weight = torch.randn(33, 7, generator=torch.Generator().manual_seed(2))
    source = write_checkpoint_dir(tmp_path / "src", {"a.0.b.weight": weight}, LLAMA)
    nf4_ok("quantize", source, tmp_path / "out")
    seen = json.loads(nf4_ok("inspect", tmp_path / "out", "a.0.b", "--json"))
    packed = read_all(tmp_path / "out")["a.0.b.weight"].reshape(-1).numpy()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: weight.numel()]
    assert seen["codes"] == np.bincount(codes, minlength=16).tolist()
    assert sum(seen["absmax_counts"]) == -(-weight.numel() // 64)


def test_inspect_an_unknown_tensor(llama_nf4):
    done = nf4("inspect", llama_nf4, "up_proj")
    assert done.returncode == 2
    assert "did you mean model.layers.0.mlp.up_proj.weight" in done.stderr


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_dequantize_is_bitsandbytes(llama, llama_nf4, tmp_path, dtype):
    nf4_ok("dequantize", llama_nf4, tmp_path / "back", "--dtype", dtype)
    back, packed = read_all(tmp_path / "back"), read_all(llama_nf4)
    source = read_all(llama)
    assert back.keys() == source.keys()
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    for name, tensor in back.items():
        assert tensor.dtype == wanted
        if f"{name}.absmax" not in packed:
            assert torch.equal(tensor, source[name].to(wanted))
            continue
        state = json.loads(packed[f"{name}.quant_state.bitsandbytes__nf4"].numpy().tobytes())
        table = packed[f"{name}.nested_quant_map"][packed[f"{name}.absmax"].int()]
        scale = packed[f"{name}.nested_absmax"].repeat_interleave(256)[: table.numel()]
        absmax = table * scale + torch.tensor(state["nested_offset"], dtype=torch.float32)
        n = tensor.numel()
        data = packed[name].reshape(-1).numpy()
        expected = bnb_dequantize(data, absmax.numpy(), 64, "nf4", n, wanted)
        assert torch.equal(tensor.reshape(-1), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert not (tmp_path / "back" / "nf4_manifest.json").exists()


def test_quantizing_what_was_decoded_gives_the_codes_back(llama_nf4, tmp_path):
    nf4_ok("dequantize", llama_nf4, tmp_path / "back", "--dtype", "float32")
    nf4_ok("quantize", tmp_path / "back", tmp_path / "again")
    first, again = read_all(llama_nf4), read_all(tmp_path / "again")
    packed = [k for k in first if k + ".absmax" in first]
    assert packed
    for name in packed:
        assert torch.equal(first[name], again[name])


def test_dequantize_does_not_depend_on_workers_or_memory(tmp_path):
    weight = torch.randn(1000, 777, generator=torch.Generator().manual_seed(4)).bfloat16()
    for config, name in ((LLAMA, "a.0.b.weight"), ({"model_type": "gpt2"}, "h.0.mlp.c_fc.weight")):
        root = tmp_path / config["model_type"]
        source = write_checkpoint_dir(root / "src", {name: weight}, config)
        nf4_ok("quantize", source, root / "out")
        nf4_ok("dequantize", root / "out", root / "a")
        nf4_ok("dequantize", root / "out", root / "b", "--workers", 3, "--memory", "80MB")
        assert same_files(root / "a", root / "b")
        assert read_all(root / "a")[name].shape == weight.shape


def test_dequantize_shards(llama_nf4, tmp_path, llama):
    nf4_ok(
        "dequantize", llama_nf4, tmp_path / "back", "--max-shard-size", "1MB", "--dtype", "float32"
    )
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1
    seen = json.loads(nf4_ok("inspect", tmp_path / "back", "--json"))
    assert seen["parameters"] == sum(t.numel() for t in read_all(llama).values())


def test_dequantize_refuses_a_plain_checkpoint(llama, tmp_path):
    done = nf4("dequantize", llama, tmp_path / "x")
    assert done.returncode == 3
    assert "no bitsandbytes 4-bit weight" in done.stderr
    assert not (tmp_path / "x").exists()
