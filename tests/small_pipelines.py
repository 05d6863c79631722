"""Diffusers pipelines of a few tensors, as directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nf4_ok
from safetensors.torch import save_file

BLOCK = "transformer_blocks.0.ff.net.0.proj.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP = {"model_type": "clip_text_model", "vocab_size": 100, "hidden_size": 64}


def denoiser(seed: int = 0) -> dict[str, torch.Tensor]:
    """What every kind of rule has a say in."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        BLOCK: (128, 64), "transformer_blocks.0.norm1.linear.weight": (384, 64),
        "transformer_blocks.0.norm1.linear.bias": (384,),
        "single_transformer_blocks.0.proj_out.weight": (64, 192),
        "x_embedder.weight": (64, 32), "conv_in.weight": (8, 4, 3, 3),
        "time_text_embed.timestep_embedder.linear_1.weight": (64, 32), "proj_out.weight": (32, 64),
    }  # fmt: skip
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


def text_encoder() -> dict[str, torch.Tensor]:
    return {
        "text_model.embeddings.token_embedding.weight": torch.randn(100, 64).bfloat16(),
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.randn(128, 64).bfloat16(),
    }


def component(root: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    root.mkdir(parents=True)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_file(tensors, root / f"{stem}.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipeline of a few tensors."""
    root = tmp_path / "pipe"
    component(root / "transformer", denoiser(), {"_class_name": "FluxTransformer2DModel"})
    component(root / "text_encoder", text_encoder(), CLIP)
    component(root / "vae", {"a.weight": torch.randn(8, 8)}, {"_class_name": "AutoencoderKL"})
    for name, text in {
        "scheduler/scheduler_config.json": "{}", "tokenizer/vocab.json": "{}", "README.md": "hi",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    index = {
        "_class_name": "FluxPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "feature_extractor": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"], "requires_safety_checker": True,
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pipeline `pipe` and its conversion `out`, never changed by a test."""
    root = tmp_path_factory.mktemp("pipeline")
    component(root / "pipe/transformer", denoiser(), {"_class_name": "FluxTransformer2DModel"})
    component(root / "pipe/text_encoder", text_encoder(), CLIP)
    index = {
        "_class_name": "FluxPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (root / "pipe/model_index.json").write_text(json.dumps(index))
    nf4_ok("quantize", root / "pipe", root / "out")
    return root
