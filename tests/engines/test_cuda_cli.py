"""The real command line on GPUs: files equal to the CPU engine's, byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from encoded_models import compressed_model, weights
from helpers import LLAMA, llama_tensors, nf4_ok, same_files, write_checkpoint_dir

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options",
    [(), ("--quant-type", "fp4"), ("--blocksize", "32"), ("--blocksize", "4096"),
     ("--no-double-quant",), ("--workers", "1"), ("--workers", "5"), ("--memory", "300MB")],
)  # fmt: skip
def test_quantize_and_dequantize_give_the_cpus_files(llama, tmp_path, gpu_nf4, gpu_arch, options):
    nf4_ok("quantize", llama, tmp_path / "cpu", "--engine", "cpu", *options)
    done = gpu_nf4("quantize", llama, tmp_path / "gpu", "--engine", "cuda", *options)
    assert f"cuda (GPU 0, sm_{gpu_arch})" in done.stdout
    assert "launched: {'GPU 0':" in done.stderr
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    gpu_nf4("verify", tmp_path / "cpu", "--source", llama, "--engine", "cuda")
    nf4_ok("verify", tmp_path / "gpu", "--source", llama, "--engine", "cpu")
    nf4_ok("dequantize", tmp_path / "cpu", tmp_path / "back-cpu", "--engine", "cpu")
    done = gpu_nf4("dequantize", tmp_path / "gpu", tmp_path / "back-gpu", "--engine", "cuda")
    assert "launched: {'GPU 0':" in done.stderr
    assert same_files(tmp_path / "back-cpu", tmp_path / "back-gpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_several_chunks(tmp_path, gpu_nf4, dtype):
    """Matrices of more than a chunk at a small --memory, tails, and weights near every limit."""
    tensors = llama_tensors(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.0.mlp.up_proj.weight"
    wide = torch.randn(1031, 777, generator=generator) * 0.05
    if dtype == torch.float32:
        wide[:8] *= 1e38
        wide[8:16] *= 1e-38
        wide[16:24] *= 1e-44
    tensors[name] = wide.to(dtype)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 64).to(dtype)
    source = write_checkpoint_dir(tmp_path / "model", tensors, LLAMA | {"torch_dtype": None})
    nf4_ok("quantize", source, tmp_path / "cpu", "--engine", "cpu")
    gpu_nf4("quantize", source, tmp_path / "gpu", "--engine", "cuda", "--memory", "300MB")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    for to in ("float32", "float16", "bfloat16"):
        if to == "float16" and dtype == torch.float32:
            continue  # values too large for it, which is refused
        nf4_ok("dequantize", tmp_path / "cpu", tmp_path / f"c{to}", "--dtype", to)
        gpu_nf4("dequantize", tmp_path / "cpu", tmp_path / f"g{to}", "--dtype", to)
        assert same_files(tmp_path / f"c{to}", tmp_path / f"g{to}")


@pytest.mark.parametrize("layout", ["even", "uneven"])
def test_float8_sources(tmp_path, gpu_nf4, layout):
    columns, block = (256, (128, 128)) if layout == "even" else (100, (7, 30))
    tensors, generator = llama_tensors(), torch.Generator().manual_seed(2)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = 96
    bits = (torch.randn(rows, columns, generator=generator) * 40).to(torch.float8_e4m3fn)
    scales = (-(-rows // block[0]), -(-columns // block[1]))
    tensors[name] = bits
    tensors[name + "_scale_inv"] = torch.rand(scales, generator=generator) * 0.01
    config = LLAMA | {
        "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": list(block),
        }
    }  # fmt: skip
    source = write_checkpoint_dir(tmp_path / "model", tensors, config)
    nf4_ok("quantize", source, tmp_path / "cpu", "--engine", "cpu")
    done = gpu_nf4("quantize", source, tmp_path / "gpu", "--engine", "cuda")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert "launched: {'GPU 0':" in done.stderr


def test_several_gpus_share_the_work(llama, tmp_path, gpu_nf4):
    nf4_ok("quantize", llama, tmp_path / "cpu", "--engine", "cpu")
    options = ("--workers", "4")
    for device, expected in (("cuda", {0, 1, 2}), ("cuda:0,2", {0, 2}), ("cuda:1", {1})):
        output = tmp_path / device.replace(":", "-")
        done = gpu_nf4("quantize", llama, output, "--device", device, *options, gpus=3)
        assert same_files(tmp_path / "cpu", output)
        used = {i for i in range(3) if f"'GPU {i}':" in done.stderr}
        assert used == expected
        many = "3 GPUs, " if device == "cuda" else "2 GPUs, " if "," in device else ""
        assert f"cuda ({many}GPU" in done.stdout


def test_auto_takes_the_gpu_and_says_so(llama, tmp_path, gpu_nf4, gpu_arch):
    done = gpu_nf4("quantize", llama, tmp_path / "out", "--json")
    assert json.loads(done.stdout)["engine"] == f"cuda (GPU 0, sm_{gpu_arch})"


def test_little_device_memory_makes_smaller_chunks(llama, tmp_path, gpu_nf4):
    nf4_ok("quantize", llama, tmp_path / "cpu", "--engine", "cpu")
    arguments = ("quantize", llama, "--engine", "cuda", "--workers", "1")
    done = gpu_nf4(*arguments[:2], tmp_path / "gpu", *arguments[2:], memory=3 << 20)
    assert "note: GPU 0 is short of memory: working in chunks of 2 MiB" in done.stderr
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    done = gpu_nf4(*arguments[:2], tmp_path / "no", *arguments[2:], memory=1000, code=4)
    assert "no 1,048,576 bytes of memory left" in done.stderr.replace("\n", " ")
    assert "--engine cpu" in done.stderr
    assert not (tmp_path / "no").exists()


def test_auto_takes_the_cpu_where_memory_is_for_no_gpu(llama, tmp_path, gpu_nf4):
    done = gpu_nf4("quantize", llama, tmp_path / "out", "--memory", "150MB")
    assert "note: a GPU is here, but does not fit into --memory 150MB" in done.stderr
    assert "cpu (" in done.stdout
    done = gpu_nf4(
        "quantize", llama, tmp_path / "no", "--memory", "150MB", "--engine", "cuda", code=2
    )
    assert "--engine cpu" in done.stderr


def test_not_a_number_is_found_where_it_is(tmp_path, gpu_nf4):
    tensors = llama_tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 77] = float("nan")
    source = write_checkpoint_dir(tmp_path / "model", tensors, LLAMA)
    done = gpu_nf4("quantize", source, tmp_path / "gpu", "--engine", "cuda", code=3)
    assert f"{name}[3, 77]" in done.stderr.replace("\n", " ")
    assert "is NaN" in done.stderr


def test_plan_counts_what_the_gpu_needs(llama, tmp_path, gpu_nf4):
    with_gpu = json.loads(gpu_nf4("quantize", llama, tmp_path / "out", "--plan", "--json").stdout)
    arguments = ("quantize", llama, tmp_path / "out", "--plan", "--json", "--engine", "cpu")
    without = json.loads(nf4_ok(*arguments))
    assert with_gpu["workers"] == without["workers"] + 1
    assert with_gpu["peak_memory_bytes"] > without["peak_memory_bytes"] + 100_000_000


@pytest.mark.parametrize("form", ["int4", "zero points", "int8", "nvfp4"])
def test_sources_in_codes(tmp_path, gpu_nf4, form):
    scheme = {
        "int4": weights(4, "int", "group", group_size=32),
        "zero points": weights(4, "int", "group", group_size=32, symmetric=False),
        "int8": weights(8, "int", "channel"),
        "nvfp4": weights(4, "float", "tensor_group", group_size=16),
    }[form]  # fmt: skip
    compressed_model(tmp_path / "model", [scheme])
    nf4_ok("quantize", tmp_path / "model", tmp_path / "cpu", "--engine", "cpu")
    done = gpu_nf4("quantize", tmp_path / "model", tmp_path / "gpu", "--engine", "cuda")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert "launched: {'GPU 0':" in done.stderr
