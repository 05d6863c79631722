"""Float8 in its rarer forms: e5m2, stacks of experts, and diffusion models in a single file."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    llama_tensors,
    nf4_ok,
    read_all,
    refused,
    write_checkpoint_dir,
)
from safetensors.torch import save_file

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PATH = "language_model.model.layers.0.feed_forward.experts"
LLAMA4 = {
    "model_type": "llama4", "vocab_size": 512, "torch_dtype": "bfloat16",
    "text_config": {"model_type": "llama4_text", "num_hidden_layers": 1},
}  # fmt: skip


def outputs_equal(work, decoded, config, *options) -> dict[str, torch.Tensor]:
    """The output of work/"source" is that of the decoded checkpoint, and is proved from it."""
    write_checkpoint_dir(work / "plain", decoded, config)
    for name in ("source", "plain"):
        nf4_ok("quantize", work / name, work / f"{name}-nf4", *options)
    ours, plain = read_all(work / "source-nf4"), read_all(work / "plain-nf4")
    assert ours.keys() == plain.keys()
    for key in plain:
        assert torch.equal(ours[key], plain[key]), key
    assert "is good" in nf4_ok("verify", work / "source-nf4", "--source", work / "source")
    return ours


def test_e5m2(tmp_path):
    generator = torch.Generator().manual_seed(1)
    stored, decoded = {}, {}
    for name, value in llama_tensors().items():
        stored[name] = decoded[name] = value
        if "layers" in name and value.dim() == 2:
            scale = torch.rand(value.shape[0], 1, generator=generator)
            stored[name], stored[name + "_scale"] = value.to(E5M2), scale
            decoded[name] = (stored[name].float() * scale).bfloat16()
    config = {"quant_method": "fp8", "fmt": "e5m2"}
    write_checkpoint_dir(tmp_path / "source", stored, {**LLAMA, "quantization_config": config})
    outputs_equal(tmp_path, decoded, LLAMA, "--keep", "o_proj")


@pytest.mark.parametrize("form", ["column", "last", "row", "matrix", "vector", "one", "blocks"])
@pytest.mark.parametrize("keep", [(), ("--keep", "experts")])
def test_llama4_experts_of_fbgemm_fp8(tmp_path, form, keep):
    """gate_up_proj is scaled by its columns, its outputs: [experts, 1, 2 * width]."""
    generator = torch.Generator().manual_seed(2)
    stored = {"language_model.model.embed_tokens.weight": torch.ones(512, 24).bfloat16()}
    decoded = dict(stored)
    for leaf, rows, columns in (("gate_up_proj", 24, 80), ("down_proj", 40, 24)):
        name = f"{PATH}.{leaf}"
        shape, seen = {
            "column": ((3, 1, columns), (3, 1, columns)), "row": ((3, rows, 1), (3, rows, 1)),
            "last": ((3, columns, 1), (3, 1, columns)), "matrix": ((3, 1, 1), (3, 1, 1)),
            "vector": ((3,), (3, 1, 1)), "one": ((), ()), "blocks": ((3, 2, 2), None),
        }[form]  # fmt: skip
        scale = torch.rand(shape, generator=generator)
        stored[name] = torch.randn(3, rows, columns, generator=generator).to(E4M3)
        stored[name + "_scale"] = scale
        if seen is None:  # blocks of which the last ones are partial
            high, wide = BLOCKS[leaf]
            spread = scale.repeat_interleave(high, 1).repeat_interleave(wide, 2)
            spread = spread[:, :rows, :columns]
        else:
            spread = scale.reshape(seen)
        decoded[name] = (stored[name].float() * spread).bfloat16()
    quantization = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    if form == "blocks":
        quantization = {
            "quant_method": "compressed-tensors",
            "config_groups": {
                leaf: {"weights": {"type": "float", "num_bits": 8, "strategy": "block",
                                   "block_structure": list(block)}}
                for leaf, block in BLOCKS.items()
            },
        }  # fmt: skip
    write_checkpoint_dir(
        tmp_path / "source", stored, {**LLAMA4, "quantization_config": quantization}
    )
    if keep:
        stored[f"{PATH}.x"] = decoded[f"{PATH}.x"] = torch.ones(1)
        extra = "language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight"
        stored[extra] = decoded[extra] = torch.randn(8, 64, generator=generator).bfloat16()
        config = {**LLAMA4, "quantization_config": quantization}
        write_checkpoint_dir(tmp_path / "source", stored, config)
    outputs_equal(tmp_path, decoded, LLAMA4, *keep)


BLOCKS = {"gate_up_proj": (16, 48), "down_proj": (24, 14)}


@pytest.mark.parametrize("form", ["raw", "scaled", "scaled by weight_scale"])
def test_diffusion_models_in_a_single_file(tmp_path, form):
    """ComfyUI's files: every weight in float8, as it is or with a scale; no config.json."""
    generator = torch.Generator().manual_seed(3)
    stored, decoded = {}, {}
    for name, shape in (("blocks.0.attn.qkv", (96, 64)), ("blocks.0.mlp.fc1", (128, 64)),
                        ("conv_in", (8, 4, 3, 3)), ("norm", (64,))):  # fmt: skip
        value = torch.randn(shape, generator=generator).to(E4M3)
        stored[f"{name}.weight"] = value
        scale = torch.tensor(1.0)
        if form != "raw":
            scale = torch.rand((), generator=generator)
            suffix = "scale_weight" if form == "scaled" else "weight_scale"
            stored[f"{name}.{suffix}"] = scale
            stored[f"{name}.scale_input"] = torch.tensor(1.0)
        decoded[f"{name}.weight"] = (value.float() * scale).bfloat16()
    if form == "scaled":
        stored["scaled_fp8"] = torch.zeros(2).to(E4M3)
    save_file(stored, tmp_path / "source.safetensors")
    save_file(decoded, tmp_path / "plain.safetensors")
    for name in ("source", "plain"):
        nf4_ok("quantize", tmp_path / f"{name}.safetensors", tmp_path / name)
    ours, plain = read_all(tmp_path / "source"), read_all(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    source = tmp_path / "source.safetensors"
    assert "is good" in nf4_ok("verify", tmp_path / "source", "--source", source)


def test_a_scaled_file_with_a_weight_without_a_scale_is_refused(work):
    stored = {
        "a.weight": torch.ones(64, 64).to(E4M3), "b.weight": torch.ones(64, 64).to(E4M3),
        "a.scale_weight": torch.ones(()), "scaled_fp8": torch.zeros(0).to(E4M3),
    }  # fmt: skip
    save_file(stored, work / "m.safetensors")
    refused(INPUT, "quantize", "m.safetensors", says=("b.weight", "incomplete"), cwd=work)


@pytest.mark.parametrize("config", [None, LLAMA])
def test_scales_that_no_config_speaks_of(tmp_path, config):
    """Mistral's own files, which have params.json; ModelOpt's float8, which may say it in
    hf_quant_config.json alone."""
    generator = torch.Generator().manual_seed(4)
    suffixes = ("weight_scale", "input_scale") if config else ("qscale_weight", "qscale_act")
    stored, decoded = {}, {}
    for name, value in llama_tensors().items():
        stored[name] = decoded[name] = value
        if "layers" in name and value.dim() == 2:
            stored[name], scale = value.to(E4M3), torch.rand((), generator=generator)
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{suffixes[0]}": scale, f"{module}.{suffixes[1]}": scale + 1}
            decoded[name] = (stored[name].float() * scale).bfloat16()
    write_checkpoint_dir(tmp_path / "source", stored, config)
    if config is None:
        params = {"dim": 64, "quantization": {"qformat_weight": "fp8_e4m3"}}
        (tmp_path / "source/params.json").write_text(json.dumps(params))
        said = nf4_ok("quantize", tmp_path / "source", "--plan")
        assert "params.json is copied as it is" in " ".join(said.split())
    outputs_equal(tmp_path, decoded, config)


@pytest.mark.parametrize("leaf", ["scale", "weight_descale", "weight.scales"])
def test_a_scale_of_an_unknown_form_is_refused(work, leaf):
    """Bytes without their scale would be other weights, without a word."""
    stored = {"a.weight": torch.ones(64, 64).to(E4M3), f"a.{leaf}": torch.ones(())}
    save_file(stored, work / "m.safetensors")
    refused(INPUT, "quantize", "m.safetensors", says=(f"a.{leaf}", "a scale"), cwd=work)
