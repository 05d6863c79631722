"""Quantize a model with llama.cpp's own library, and write what its linear layers decode to.

    llama.py MODEL GGUF TOKENS.npy PLACE

The importance matrix is what llama-imatrix makes: the mean square of each column of a layer's input
over the text, in the full-precision model.  PLACE/NAME are float32 checkpoints for nf4 eval:

- q4_k_m, iq4_nl: llama_model_quantize with that type and the matrix.  A row whose length is no
  multiple of 256 cannot be stored in Q4_K or Q6_K: llama.cpp takes Q5_0 or Q8_0 for it;
- q4_k_m_across: what Q4_K_M is in wider models.  Four rows that lie in one are quantized as a row,
  so that blocks of 256 fill; sub-blocks of 32 stay within a row as 32 divides its length.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from safetensors.torch import load_file
from sources import finish, linear_name, linear_weights, unpermuted
from transformers import AutoModelForCausalLM

Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
LIBRARIES = Path(sys.prefix) / "llama" / "package" / "bins" / "linux-x64"
"""Where scripts/compare_formats unpacks llama.cpp."""
FTYPES = {"q4_k_m": "MOSTLY_Q4_K_M", "iq4_nl": "MOSTLY_IQ4_NL"}


def importance(model: Path, tokens: Any) -> dict[str, np.ndarray]:
    """Return the mean square of each column of each linear layer's input: float32 [columns]."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, Any] = {}
    for name in linear_weights(model):
        module = loaded.get_submodule(name.removesuffix(".weight"))

        def add(_: Any, inputs: Any, name: str = name) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1))

        module.register_forward_pre_hook(add)
    with torch.inference_mode():
        for window in tokens:
            loaded.model(input_ids=torch.from_numpy(window[None]), use_cache=False)
    return {name: (value / tokens.size).float().numpy() for name, value in sums.items()}


def permuted(values: np.ndarray, config: dict[str, Any], tensor: str) -> np.ndarray:
    """Put rows of a query or key into llama.cpp's order: what `unpermuted` takes back."""
    order = unpermuted(np.arange(len(values)), config, tensor)
    return values[np.argsort(order)]


def write_gguf(model: Path, template: Path, path: Path) -> None:
    """Write a checkpoint as a GGUF in float32, with another GGUF's fields and other tensors."""
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    reader = gguf.GGUFReader(template)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith(skipped):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        name = linear_name(tensor.name)
        if name is None:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        else:
            values = permuted(tensors[name].float().numpy(), config, tensor.name)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Imatrix(ctypes.Structure):
    """llama_model_imatrix_data: the importance of a tensor's columns."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t),
    )  # fmt: skip


class Parameters(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("types", ctypes.c_int32 * 2),
        ("flags", ctypes.c_bool * 6), ("imatrix", ctypes.POINTER(Imatrix)),
        ("overrides", ctypes.c_void_p * 3), ("max_buf_size", ctypes.c_size_t),
    )  # fmt: skip


def opened(name: str) -> ctypes.CDLL:
    """Load a library of llama.cpp, and those that it needs from beside it."""
    (path,) = LIBRARIES.glob(f"{name}.*")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def quantize(source: Path, output: Path, kind: str, columns: dict[str, np.ndarray]) -> None:
    """Run llama_model_quantize with an importance matrix.

    Args:
        kind: gguf.LlamaFileType's name.
        columns: ggml's name of a weight -> float32 [columns].

    Raises:
        SystemExit: llama.cpp refuses.
    """
    opened("libggml").ggml_backend_load_all_from_path(str(LIBRARIES).encode())
    library = opened("libllama")
    library.llama_model_quantize_default_params.restype = Parameters
    entries = (Imatrix * (len(columns) + 1))()  # the last one, empty, ends the list
    for entry, (name, value) in zip(entries, columns.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), value.ctypes.data, len(value)
    asked = library.llama_model_quantize_default_params()
    asked.nthread, asked.ftype, asked.imatrix = 1, int(gguf.LlamaFileType[kind]), entries
    if library.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(asked)
    ):
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}")


def decoded(
    path: Path, config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], int, dict[str, int]]:
    """Decode the linear layers of a GGUF.

    Returns:
        weight -> float32 [rows, columns] in transformers' order; bits of all; type -> weights.
    """
    weights, stored, kinds = {}, 0, {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = linear_name(tensor.name)
        if name is not None:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            values = np.ascontiguousarray(unpermuted(values, config, tensor.name))
            weights[name] = torch.from_numpy(values)
            stored += 8 * int(tensor.n_bytes)
            kind = tensor.tensor_type.name
            kinds[kind] = kinds.get(kind, 0) + int(tensor.n_elements)
    return weights, stored, kinds


def more_bits(layer: int, layers: int) -> bool:
    """Say whether Q4_K_M has Q6_K for a layer's attn_v and ffn_down (its use_more_bits)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def across(weight: np.ndarray, columns: np.ndarray, kind: Any) -> tuple[torch.Tensor, int]:
    """Quantize with blocks of 256 that run across rows, with ggml_quantize_chunk.

    Returns:
        the decoded float32 [rows, columns], and the bits stored.
    """
    library = opened("libggml-base")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, length = weight.shape
    together = next(count for count in (1, 2, 4, 8) if count * length % 256 == 0)
    values = np.ascontiguousarray(weight, np.float32).reshape(rows // together, -1)
    matrix = np.ascontiguousarray(np.tile(columns, together), np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    output = np.zeros(values.size // block * size, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, output, matrix)]
    numbers = [ctypes.c_int64(number) for number in (0, *values.shape)]
    library.ggml_quantize_chunk(int(kind), *pointers[:2], *numbers, pointers[2])
    found = gguf.dequantize(output.reshape(len(values), -1), kind)
    return torch.from_numpy(found.reshape(rows, length)), 8 * output.size


def main() -> None:
    """Make the three checkpoints."""
    model, template, tokens, place = map(Path, sys.argv[1:5])
    config = json.loads((model / "config.json").read_text())
    kept = place / "importance.safetensors"
    if not kept.is_file():
        save_file(importance(model, np.load(tokens)), kept)
    matrix = load_numpy(kept)
    names = {t.name: linear_name(t.name) for t in gguf.GGUFReader(template).tensors}
    columns = {tensor: matrix[name] for tensor, name in names.items() if name is not None}
    source, output = place / "source.gguf", place / "quantized.gguf"
    write_gguf(model, template, source)
    for label, kind in FTYPES.items():
        quantize(source, output, kind, columns)
        weights, stored, kinds = decoded(output, config)
        finish(model, place / label, weights, stored, types=kinds)
    weights, stored, kinds = {}, 0, {}
    for name, value in linear_weights(model).items():
        layer, more = int(name.split(".")[2]), name.endswith(("v_proj.weight", "down_proj.weight"))
        kind = Q6_K if more and more_bits(layer, config["num_hidden_layers"]) else Q4_K
        weights[name], size = across(value.float().numpy(), matrix[name], kind)
        stored, kinds[kind.name] = stored + size, kinds.get(kind.name, 0) + value.numel()
    finish(model, place / "q4_k_m_across", weights, stored, types=kinds)


if __name__ == "__main__":
    main()
