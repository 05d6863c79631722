"""Mixtures of experts: what each loader takes, and fused experts taken apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    USAGE,
    bnb_quantize,
    carry_out,
    llama_tensors,
    nf4_ok,
    read_all,
    refused,
    write_checkpoint_dir,
)
from safetensors.torch import save_file

from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import Resources

STATE = ".quant_state.bitsandbytes__nf4"
EXPERTS, HIDDEN, WIDTH = 3, 64, 40


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1).bfloat16()


def llama4(root: Path, dtype: torch.dtype = torch.bfloat16, hidden: int = HIDDEN) -> Path:
    path = "language_model.model.layers.0"
    tensors = {
        "language_model.model.embed_tokens.weight": matrix(512, hidden),
        f"{path}.feed_forward.router.weight": matrix(EXPERTS, hidden),
        f"{path}.feed_forward.experts.gate_up_proj": matrix(EXPERTS, hidden, 2 * WIDTH, seed=1),
        f"{path}.feed_forward.experts.down_proj": matrix(EXPERTS, WIDTH, hidden, seed=2),
        f"{path}.feed_forward.shared_expert.up_proj.weight": matrix(WIDTH, hidden, seed=3),
    }
    config = {
        "model_type": "llama4", "vocab_size": 512, "torch_dtype": "bfloat16",
        "text_config": {"model_type": "llama4_text", "num_hidden_layers": 1},
    }  # fmt: skip
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    return write_checkpoint_dir(root, tensors, config)


def slices(source: Path) -> dict[str, torch.Tensor]:
    """Every expert's matrix as transformers' SequentialLlama4TextExperts holds it."""
    path = "language_model.model.layers.0.feed_forward.experts."
    stored = read_all(source)
    found = {}
    for expert in range(EXPERTS):
        gate, up = stored[path + "gate_up_proj"][expert].chunk(2, dim=-1)
        down = stored[path + "down_proj"][expert]
        for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            found[f"{path}{expert}.{name}.weight"] = value.T.contiguous()
    return found


@pytest.mark.parametrize("target", ["transformers", "vllm", "unsloth"])
def test_llama4_experts_become_matrices(tmp_path, target):
    source, out = llama4(tmp_path / "src"), tmp_path / "out"
    nf4_ok("quantize", source, out, "--target", target)
    written = read_all(out)
    for name, value in slices(source).items():
        packed, _ = bnb_quantize(value, 64, "nf4")
        assert written[name].flatten().tolist() == packed.tolist(), name
        state = json.loads(written[name + STATE].numpy().tobytes())
        assert state["shape"] == list(value.shape)
    assert "language_model.model.layers.0.feed_forward.router.weight" + STATE not in written
    assert not any("gate_up_proj" in name for name in written)
    assert "is good" in nf4_ok("verify", out, "--source", source)


def test_llama4_experts_in_small_chunks(tmp_path, all_engines):
    source = llama4(tmp_path / "src", hidden=4096)
    engine = next(iter(all_engines.values()))
    plan = make_plan(open_checkpoint(source), QuantConfig())
    for name, resources in (("a", Resources(2, 8 << 20, 0)), ("b", Resources(3, 1 << 19, 0))):
        carry_out(plan, tmp_path / name, engine, resources)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    for name, value in slices(source).items():
        packed, _ = bnb_quantize(value, 64, "nf4")
        assert a[name].flatten().tolist() == b[name].flatten().tolist() == packed.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [(), ("*experts*",)])
def test_llama4_experts_of_other_dtypes_in_small_chunks(tmp_path, all_engines, dtype, keep):
    """Columns take more of a worker's buffers than of one; what is made of them must not reach
    into them."""
    source = llama4(tmp_path / "src", dtype, hidden=4096)
    engine = next(iter(all_engines.values()))
    config = QuantConfig(keep=keep, dtype="float32" if keep else "auto")
    plan = make_plan(open_checkpoint(source), config)
    for name, chunk in (("large", 8 << 20), ("small", 1 << 19)):
        carry_out(plan, tmp_path / name, engine, Resources(2, chunk, 0))
    large, small = read_all(tmp_path / "large"), read_all(tmp_path / "small")
    assert all(torch.equal(small[name], large[name]) for name in large)
    for name, value in slices(source).items():
        if keep:
            assert torch.equal(small[name], value.float()), name


def test_kept_llama4_experts_are_matrices_too(tmp_path):
    source, out = llama4(tmp_path / "src", torch.float32), tmp_path / "out"
    nf4_ok("quantize", source, out, "--keep", "experts")
    written = read_all(out)
    for name, value in slices(source).items():
        assert torch.equal(written[name], value.bfloat16()), name
    assert "is good" in nf4_ok("verify", out, "--source", source)


@pytest.mark.parametrize("target", ["transformers", "unsloth", "vllm"])
def test_a_llama4_expert_with_a_nan_is_kept_as_a_matrix(tmp_path, target):
    """vLLM loads no expert in 16 bits, so there it is refused."""
    source = llama4(tmp_path / "src")
    tensors = read_all(source)
    tensors["language_model.model.layers.0.feed_forward.experts.gate_up_proj"][1, 5, 7] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = ("--on-nonfinite", "keep", "--target", target)
    if target == "vllm":
        refused(INPUT, "quantize", source, "out", *options,
                says=("experts.1.gate_proj", "repair the source"), cwd=tmp_path)  # fmt: skip
        return
    nf4_ok("quantize", source, tmp_path / "out", *options)
    written = read_all(tmp_path / "out")
    gate = "language_model.model.layers.0.feed_forward.experts.1.gate_proj.weight"
    assert torch.isnan(written[gate]).nonzero().tolist() == [[7, 5]]
    kept = {name for name in slices(source) if name + STATE not in written}
    assert kept == {gate}
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def mixtral(root: Path) -> Path:
    tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    for layer in range(2):
        path = f"model.layers.{layer}.block_sparse_moe."
        tensors[path + "gate.weight"] = matrix(4, 64)
        for expert in range(4):
            for w, shape in (("w1", (128, 64)), ("w2", (64, 128)), ("w3", (128, 64))):
                tensors[f"{path}experts.{expert}.{w}.weight"] = matrix(*shape, seed=expert)
    return write_checkpoint_dir(root, tensors, {**LLAMA, "model_type": "mixtral"})


def test_experts_stay_or_go_by_target(tmp_path):
    source = mixtral(tmp_path / "src")
    for target in ("transformers", "vllm", "unsloth"):
        nf4_ok("quantize", source, tmp_path / target, "--target", target)
        nf4_ok("verify", tmp_path / target, "--source", source)
        written = read_all(tmp_path / target)
        packed = [name for name in written if "experts" in name and name.endswith(STATE)]
        assert len(packed) == {"transformers": 0, "vllm": 24, "unsloth": 4}[target]
        assert not any("gate.weight" + STATE in name for name in written)
        keys = json.loads((tmp_path / target / "config.json").read_text())
        skip = keys["quantization_config"]["llm_int8_skip_modules"]
        assert "model.layers.0.block_sparse_moe.gate" in skip
        assert ("model.layers.0.block_sparse_moe.experts" in skip) == (target == "transformers")


def test_the_summary_first_says_what_staying_experts_cost(tmp_path):
    source = mixtral(tmp_path / "src")
    first = nf4_ok("quantize", source, tmp_path / "out").splitlines()[0]
    assert "experts stay in bfloat16" in first
    document = json.loads(nf4_ok("quantize", source, tmp_path / "x", "--plan", "--json"))
    assert f"{document['bits_per_weight']:.2f} bits a weight" in first
    assert (
        "experts"
        not in nf4_ok("quantize", source, tmp_path / "y", "--target", "vllm").split("\n")[0]
    )


def test_fused_experts_that_no_loader_takes_stay(tmp_path):
    tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts."
        tensors[path + "gate_up_proj"] = matrix(4, 64, 256)
        tensors[path + "gate_up_proj_bias"] = matrix(4, 256)
    source = write_checkpoint_dir(tmp_path / "src", tensors, {**LLAMA, "model_type": "gpt_oss"})
    refused(INPUT, "quantize", source, "out", "--target", "vllm",
            says=("3-D parameter", "--target transformers"), cwd=tmp_path)  # fmt: skip
    for target, family in (("transformers", "gpt_oss"), ("unsloth", "ernie4_5_vl_moe_text")):
        config = {**LLAMA, "model_type": family}  # none of the families that unsloth takes
        (source / "config.json").write_text(json.dumps(config))
        said = nf4_ok("quantize", source, tmp_path / target, "--target", target)
        assert "3-D parameters, which no loader holds in 4 bit" in said
        written = read_all(tmp_path / target)
        assert torch.equal(written[path + "gate_up_proj"], tensors[path + "gate_up_proj"])


def test_vllm_refuses_what_it_cannot_load(work):
    refused(USAGE, "quantize", "model", "--target", "vllm", "--quant-storage", "bfloat16",
            says=("uint8 only",), cwd=work)  # fmt: skip
    refused(USAGE, "quantize", "model", "--target", "vllm", "--keep", "k_proj",
            says=("k_proj stays", "one qkv_proj"), cwd=work)  # fmt: skip
    refused(USAGE, "quantize", "model", "--target", "sglang", says=("--target sglang",), cwd=work)


def test_vllm_refuses_experts_that_are_half_packed(tmp_path):
    source = mixtral(tmp_path / "src")
    refused(USAGE, "quantize", source, "out", "--target", "vllm", "--keep", "experts.1",
            says=("other experts of its layer", "keep them all"), cwd=tmp_path)  # fmt: skip


def test_what_chooses_between_experts_keeps_its_float32(tmp_path):
    """In bfloat16 the biases of DeepSeek-V3's router, 7.398 and 7.411, would be one value."""
    bias = torch.tensor([7.3979, 7.4107, 7.4161, 7.4085])
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    tensors = {**llama_tensors(), name: bias}
    source = write_checkpoint_dir(tmp_path / "src", tensors, {**LLAMA, "model_type": "deepseek_v3"})
    nf4_ok("quantize", source, tmp_path / "out")
    assert torch.equal(read_all(tmp_path / "out")[name], bias)


def test_vllm_is_told_its_own_names_of_kept_modules(work):
    nf4_ok("quantize", "model", "out", "--target", "vllm", "--keep", "layers.0.mlp", cwd=work)
    config = json.loads((work / "out" / "config.json").read_text())
    skip = config["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.mlp.gate_up_proj" in skip
    assert "model.layers.0.mlp.gate_proj" in skip
    assert not any("qkv_proj" in key for key in skip)
