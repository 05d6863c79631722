"""Tiny checkpoints whose weights are stored as codes, and what the formats' libraries decode."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import LLAMA, llama_tensors, write_checkpoint_dir

GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "vocab_size": 100,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def gpt_oss(root: Path, shards: int = 2, hidden: int = 64, middle: int = 96) -> dict:
    """A gpt-oss checkpoint in MXFP4; returns its tensors as transformers decodes them, in bf16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(5)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    experts = GPT_OSS["num_local_experts"]
    sizes = {"hidden_size": hidden, "intermediate_size": middle}
    stored = {
        "model.embed_tokens.weight": floats(100, hidden), "lm_head.weight": floats(100, hidden),
        "model.norm.weight": floats(hidden),
    }  # fmt: skip
    decoded: dict[str, torch.Tensor] = {}
    for layer in range(2):
        path = f"model.layers.{layer}"
        for name, width in (("q", 64), ("k", 32), ("v", 32)):
            stored[f"{path}.self_attn.{name}_proj.weight"] = floats(width, hidden)
            stored[f"{path}.self_attn.{name}_proj.bias"] = floats(width)
        stored[f"{path}.self_attn.o_proj.weight"] = floats(hidden, 64)
        stored[f"{path}.self_attn.sinks"] = floats(4)
        stored[f"{path}.input_layernorm.weight"] = floats(hidden)
        stored[f"{path}.post_attention_layernorm.weight"] = floats(hidden)
        stored[f"{path}.mlp.router.weight"] = floats(experts, hidden)
        stored[f"{path}.mlp.router.bias"] = floats(experts)
        for name, rows, columns in (
            ("gate_up_proj", 2 * middle, hidden),
            ("down_proj", hidden, middle),
        ):
            key = f"{path}.mlp.experts.{name}"
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(110, 140, shape, generator=generator, dtype=torch.uint8)
            scales[0, 0, 0], scales[1, 1, 1] = 0, 250
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
            stored[f"{key}_bias"] = floats(experts, rows)
            decoded[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    plain = {k: v for k, v in stored.items() if not k.endswith(("_blocks", "_scales"))}
    write_checkpoint_dir(
        root, stored, {**GPT_OSS, **sizes, "quantization_config": MXFP4}, shards=shards
    )
    return {**plain, **decoded}


def weights(bits: int, kind: str, strategy: str, **more: object) -> dict:
    """The `weights` of a compressed-tensors scheme."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def compressed(**groups: dict) -> dict:
    """A quantization_config of compressed-tensors with these config groups."""
    return {
        "quant_method": "compressed-tensors", "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            name: {"targets": ["Linear"], "weights": scheme} for name, scheme in groups.items()
        },
    }  # fmt: skip


def library(scheme: dict, form: str | None = None):
    """compressed-tensors' own compressor for a scheme, and the scheme as it takes it."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    parsed = QuantizationScheme(targets=["Linear"], weights=scheme)
    form = form or {
        ("int", 4): "pack-quantized", ("int", 8): "pack-quantized", ("float", 8): "float-quantized",
        ("float", 4): "nvfp4-pack-quantized",
    }[scheme["type"], scheme["num_bits"]]  # fmt: skip
    if scheme["strategy"] == "group" and scheme["type"] == "float":  # not NVFP4's tensor_group
        form = "mxfp4-pack-quantized"
    return BaseCompressor.get_value_from_registry(form), parsed


def packed(scheme: dict, weight: torch.Tensor, dtype: torch.dtype, seed: int) -> dict:
    """The tensors that compressed-tensors stores for a weight, with scales of this dtype."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    group = scheme.get("group_size") or columns
    shape = (1,) if scheme["strategy"] == "tensor" else (rows, columns // group)
    bits, is_float = scheme["num_bits"], scheme["type"] == "float"
    compressor, parsed = library(scheme)
    scale = (torch.rand(shape, generator=generator) * 0.9 + 0.1) * weight.abs().max().float()
    state = {
        "weight": weight.float(),
        "weight_scale": (scale / (6 if is_float else 2 ** (bits - 1))),
    }
    if is_float and scheme["strategy"] == "tensor_group":
        state["weight_global_scale"] = torch.tensor([437.3])
        state["weight_scale"] = (state["weight_scale"] * 437.3).to(torch.float8_e4m3fn).float()
    elif not is_float:
        state["weight_scale"] = state["weight_scale"].to(dtype).float()
    if not scheme["symmetric"]:
        half = 2 ** (bits - 1)
        zeros = torch.randint(-half, half, shape, generator=generator)
        state["weight_zero_point"] = zeros.to(torch.int8)
    stored = compressor.compress(state, parsed)
    if not is_float:
        stored["weight_scale"] = stored["weight_scale"].to(dtype)
    return {k: v for k, v in stored.items() if isinstance(v, torch.Tensor)}


def unpacked(scheme: dict, stored: dict) -> torch.Tensor:
    """What compressed-tensors decodes stored tensors to."""
    compressor, parsed = library(scheme)
    return compressor.decompress(dict(stored), parsed)["weight"]


def compressed_model(
    root: Path, schemes: list[dict], dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """A checkpoint of compressed-tensors, each of its weights by the next of the schemes; returns
    what the library decodes, in bf16."""
    stored, decoded = {}, {}
    number = 0
    for name, value in llama_tensors().items():
        if "layers" not in name or value.dim() != 2:
            stored[name] = decoded[name] = value
            continue
        scheme = schemes[number % len(schemes)]
        parts = packed(scheme, value, dtype, number)
        decoded[name] = unpacked(scheme, parts).to(torch.bfloat16)
        base = name.removesuffix("weight")
        stored |= {base + part: tensor for part, tensor in parts.items()}
        number += 1
    config = compressed(**{f"group_{i}": scheme for i, scheme in enumerate(schemes)})
    write_checkpoint_dir(root, stored, {**LLAMA, "quantization_config": config}, shards=2)
    return decoded


def nvfp4_of_modelopt(root: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as ModelOpt stores NVFP4, and one layer in float8; returns what it decodes to.

    As ModelOpt's NVFP4QTensor.dequantize computes it: values times (scale times double scale), all
    in float32, rounded once.
    """
    generator = torch.Generator().manual_seed(11)
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    stored, decoded = {}, {}
    for name, value in llama_tensors().items():
        if "layers" not in name or value.dim() != 2:
            stored[name] = decoded[name] = value
            continue
        rows, columns = value.shape
        base = name.removesuffix("weight")
        stored[base + "input_scale"] = torch.ones(())
        if "down_proj" in name:
            scale = torch.rand((), generator=generator) * 0.01
            stored[name] = (value.float() / 0.01).to(torch.float8_e4m3fn)
            stored[name + "_scale"] = scale
            decoded[name] = (stored[name].float() * scale).to(torch.bfloat16)
            continue
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        shape = (rows, columns // 16)
        scale = (torch.rand(shape, generator=generator) * 400).to(torch.float8_e4m3fn)
        unit = torch.rand((), generator=generator) * 1e-3
        values = table[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
        factors = (scale.float() * unit).repeat_interleave(16, 1)
        stored[name] = codes[:, ::2] | codes[:, 1::2] << 4
        stored[name + "_scale"], stored[name + "_scale_2"] = scale, unit
        decoded[name] = (values * factors).to(torch.bfloat16)
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    write_checkpoint_dir(root, stored, {**LLAMA, "quantization_config": config}, shards=2)
    return decoded


def _words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack each 8 neighbours of a row into an int32; nibble i takes neighbour order[i]."""
    parts = codes.reshape(codes.shape[0], -1, 8).to(torch.int64)
    words = sum(parts[:, :, element] << 4 * nibble for nibble, element in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_or_awq(
    root: Path, method: str, dtype: torch.dtype = torch.float16, **config: object
) -> dict[str, torch.Tensor]:
    """A checkpoint of GPTQ or AWQ in 4 bits and groups of 32; returns what it decodes to, in bf16.

    As GPTQModel and AutoAWQ compute it, in the dtype of the scales: (code - zero point) * scale.
    """
    generator = torch.Generator().manual_seed(13)
    stored, decoded = {}, {}
    for name, value in llama_tensors().items():
        if "layers" not in name or value.dim() != 2:
            stored[name] = decoded[name] = value
            continue
        rows, columns = value.shape
        base, groups = name.removesuffix("weight"), columns // 32
        codes = torch.randint(0, 16, (columns, rows), generator=generator)
        zeros = torch.randint(0, 16, (groups, rows), generator=generator)
        scales = (torch.rand(groups, rows, generator=generator) * 0.01).to(dtype)
        order = torch.arange(columns) // 32
        if config.get("desc_act"):
            order = order[torch.randperm(columns, generator=generator)]
        weight = (codes - zeros[order]).to(dtype) * scales[order]
        decoded[name] = weight.T.contiguous().to(torch.bfloat16)
        stored[base + "scales"] = scales
        if method == "awq":
            packing = (0, 2, 4, 6, 1, 3, 5, 7)
            stored[base + "qweight"] = _words(codes, packing)
            stored[base + "qzeros"] = _words(zeros, packing)
            continue
        stored[base + "qweight"] = _words(codes.T).T.contiguous()
        less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        stored[base + "qzeros"] = _words((zeros - less) % 16)
        stored[base + "g_idx"] = order.to(torch.int32)
    quantization = {"quant_method": method, "bits": 4, "group_size": 32, **config}
    write_checkpoint_dir(root, stored, {**LLAMA, "quantization_config": quantization}, shards=2)
    return decoded
