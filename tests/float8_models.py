"""Tiny float8 checkpoints in every form that models are published in."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import LLAMA, llama_tensors, write_checkpoint_dir

FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [24, 40],
}  # fmt: skip


def compressed(strategy: str, **more: object) -> dict:
    weights = {"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def spread(scale: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """One factor an element."""
    full = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[: shape[0], : shape[1]]


def float8_model(
    root: Path, quantization: dict, suffix: str, block: tuple[int, int], form: str, dtype: str
) -> dict[str, torch.Tensor]:
    """A float8 checkpoint in two shards; returns what its weights decode to, in bf16.

    Args:
        block: elements that share a factor, 0 for all of the dimension.
        form: shape of the scale tensors: "matrix", "vector" or "scalar".
        dtype: of the scale tensors.
    """
    generator = torch.Generator().manual_seed(7)
    stored, decoded = {}, {}
    for name, value in llama_tensors().items():
        if "layers" not in name or value.dim() != 2:
            stored[name] = decoded[name] = value
            continue
        rows, columns = block[0] or value.shape[0], block[1] or value.shape[1]
        grid = (-(-value.shape[0] // rows), -(-value.shape[1] // columns))
        scale = torch.rand(grid, generator=generator) * 0.01 + 1e-4
        if dtype == "float8_e8m0fnu":
            scale = torch.exp2(torch.randint(-12, -3, grid, generator=generator).float())
        scale = scale.to(getattr(torch, dtype))
        factors = spread(scale.float(), tuple(value.shape), (rows, columns))
        bits = (value.float() / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
        decoded[name] = (bits.to(torch.float32) * factors).to(torch.bfloat16)
        stored[name] = bits
        shape = {"matrix": grid, "vector": grid[:1], "scalar": ()}[form]
        stored[name + suffix] = scale.reshape(shape)
        stored[name.removesuffix("weight") + "input_scale"] = torch.ones(())
    write_checkpoint_dir(root, stored, {**LLAMA, "quantization_config": quantization}, shards=2)
    return decoded


CASES = {
    "deepseek": (FP8, "_scale_inv", (24, 40), "matrix", "float32"),
    "whole blocks": ({**FP8, "weight_block_size": [32, 64]}, "_scale_inv", (32, 64), "matrix",
                     "float32"),
    "powers of two": (FP8, "_scale_inv", (24, 40), "matrix", "float8_e8m0fnu"),
    "static": ({**FP8, "weight_block_size": None}, "_scale_inv", (0, 0), "scalar", "bfloat16"),
    "AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, "_scale", (0, 0), "scalar",
                "float32"),
    "per tensor": (compressed("tensor"), "_scale", (0, 0), "matrix", "bfloat16"),
    "per channel": (compressed("channel"), "_scale", (1, 0), "matrix", "bfloat16"),
    "per row": (compressed("channel"), "_scale", (1, 0), "vector", "float32"),
    "blocks": (compressed("block", block_structure=[16, 32]), "_scale", (16, 32), "matrix",
               "float16"),
}  # fmt: skip
