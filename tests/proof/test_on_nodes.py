"""A proof and a way back on many machines find, and write, what one machine does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from elsewhere import RESOURCES, Elsewhere
from helpers import LLAMA, llama_tensors, nf4_ok, read_all, same_files, write_checkpoint_dir
from safetensors.torch import save_file

from nf4cli.convert.dequantize import plan_decoding, write_decoded
from nf4cli.engines.cpu import CpuEngine
from nf4cli.proof.verify import verify

RECIPES = [
    (), ("--scale", "search"), ("--no-double-quant", "--quant-type", "fp4"),
    ("--dtype", "float32", "--blocksize", "128"), ("--quant-storage", "bfloat16"),
    ("--target", "vllm", "--digest", "sha256"),
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Llama in five files, whose outputs have two."""
    tensors = llama_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(6000, 64).bfloat16()
    config = {**LLAMA, "vocab_size": 6000}
    return write_checkpoint_dir(tmp_path_factory.mktemp("nodes") / "llama", tensors, config, 5)


def decoded_alike(output: Path, place: Path) -> bool:
    """Whether the files that tasks decode are those of one process."""
    engine = CpuEngine()
    model = plan_decoding(output, engine, max_shard_size=1_000_000)
    write_decoded(model, place / "one", engine, RESOURCES)
    write_decoded(model, place / "many", engine, RESOURCES, cluster=Elsewhere(2))
    return same_files(place / "one", place / "many")


@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_every_recipe(source, tmp_path, recipe):
    out = tmp_path / "out"
    nf4_ok("quantize", source, out, "--max-shard-size", "1MB", "-q", *recipe)
    for original in (None, source):
        elsewhere = Elsewhere(3)
        alone = verify(out, original, CpuEngine(), RESOURCES)
        many = verify(out, original, CpuEngine(), RESOURCES, cluster=elsewhere)
        assert alone.ok
        assert len(elsewhere.made) >= 2
        assert (many.findings, many.unchecked, many.notes) == (
            alone.findings, alone.unchecked, alone.notes
        )  # fmt: skip
    assert decoded_alike(out, tmp_path)


def test_statistics_that_lie_in_other_files(source, tmp_path):
    """As another program may write them: the codes in one file, all else in another."""
    out, other = tmp_path / "out", tmp_path / "other"
    nf4_ok("quantize", source, out, "-q")
    other.mkdir()
    parts: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for key, tensor in read_all(out).items():
        parts[not key.endswith(".weight")][key] = tensor
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, other / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (other / "model.safetensors.index.json").write_text(index)
    shutil.copy(out / "config.json", other)
    assert verify(other, None, CpuEngine(), RESOURCES, cluster=Elsewhere()).ok
    assert decoded_alike(other, tmp_path)
