"""Tiny PEFT adapters, written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nf4cli.checkpoint.discovery import open_checkpoint


def write_adapter(model: Path, place: Path, seed: int = 0) -> Path:
    """Write a LoRA of every second matrix of a model's layers."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = {n: t.shape for n, (_, t) in open_checkpoint(model).tensors.items()}
    names = [n for n, shape in shapes.items() if len(shape) == 2 and ".layers." in n]
    for name in names[::2]:
        rows, columns = shapes[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=random)
        tensors[f"{module}.lora_B.weight"] = 0.01 * torch.randn(rows, 4, generator=random)
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place
