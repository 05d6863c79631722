"""Diffusion models in a single file: what their programs read from shapes stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import nf4_ok, read_all
from safetensors.torch import save_file

from nf4cli.planning.single_file import denoiser_of

PREFIX = "model.diffusion_model."
FLUX = {
    "img_in": (128, 64), "txt_in": (128, 96), "time_in.in_layer": (128, 256),
    "vector_in.out_layer": (128, 128), "guidance_in.in_layer": (128, 256),
    "final_layer.linear": (64, 128), "final_layer.adaLN_modulation.1": (256, 128),
    "double_blocks.0.img_attn.qkv": (384, 128), "double_blocks.0.txt_mlp.0": (512, 128),
    "single_blocks.0.linear1": (896, 128),
}  # fmt: skip
UNET = {
    "time_embed.0": (128, 32), "label_emb.0.0": (128, 64),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (64, 96),
    "input_blocks.4.1.transformer_blocks.1.attn2.to_k": (64, 96),
    "middle_block.1.transformer_blocks.0.attn1.to_q": (64, 64),
}  # fmt: skip
BESIDE = {
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.float16,
    "vae.decoder.conv_in.weight": torch.float32,
}


def packed(root: Path) -> set[str]:
    return {
        name.removesuffix(".weight.absmax").removeprefix(PREFIX)
        for name in read_all(root)
        if name.endswith(".absmax") and "nested" not in name
    }


def convert(place: Path, shapes: dict[str, tuple[int, int]], prefix: str, beside: bool) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{prefix}{name}.weight": torch.randn(*shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }
    if shapes is UNET:
        tensors[f"{prefix}input_blocks.0.0.weight"] = torch.ones(64, 4, 3, 3)
    if beside:
        tensors |= {name: torch.full((64, 64), 0.1, dtype=dtype) for name, dtype in BESIDE.items()}
    save_file(tensors, place / "model.safetensors")
    source = place / "model.safetensors"
    nf4_ok("quantize", source, place / "out", "-q")
    assert "is good" in nf4_ok("verify", place / "out", "--source", source)
    return place / "out"


@pytest.mark.parametrize(("prefix", "beside"), [(PREFIX, True), (PREFIX, False), ("", False)])
def test_blocks_are_packed_and_both_ends_are_not(tmp_path, prefix, beside):
    out = convert(tmp_path, FLUX, prefix, beside)
    assert packed(out) == {
        "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1"
    }  # fmt: skip
    tensors = read_all(out)
    for name, dtype in BESIDE.items() if beside else ():
        assert tensors[name].dtype == dtype
        assert bool((tensors[name] == torch.tensor(0.1, dtype=dtype)).all())
    rules = {
        name.removeprefix(prefix): record["rule"]
        for name, record in json.loads((out / "nf4_manifest.json").read_text())["tensors"].items()
        if "rule" in record
    }
    assert rules["img_in.weight"] == "shape-read"


def test_the_width_of_the_text_stays_in_a_unet(tmp_path):
    out = convert(tmp_path, UNET, PREFIX, False)
    assert packed(out) == {
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
        "middle_block.1.transformer_blocks.0.attn1.to_q",
    }


def test_other_bare_files_are_no_diffusion_models():
    assert denoiser_of(["model.layers.0.mlp.up_proj.weight", "vae.conv.weight"]) is None
    assert denoiser_of(["double_blocks.0.img_attn.qkv.weight"]) == ""
