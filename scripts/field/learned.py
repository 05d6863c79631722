#!/usr/bin/env python3
"""Quantizes a model with AutoRound or GPTQModel on given tokens, and writes what its weights decode to.

    learned.py autoround|gptq MODEL TOKENS.npy OUTPUT [--group N] [--iters N] [--batch N]

OUTPUT is a float32 checkpoint for nf4 eval, with bits.json beside the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bits
from sources import copy_with, linear_weights


def autoround(model: Path, tokens: Any, asked: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return the weights that AutoRound's W4A16 decodes to, by name."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    rounding = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), scheme="W4A16", group_size=asked.group,
        dataset=windows, nsamples=len(tokens), seqlen=tokens.shape[1], iters=asked.iters,
        batch_size=asked.batch, device_map="cpu", amp=False,
    )  # fmt: skip
    quantized, _ = rounding.quantize()
    return {name: value.detach().float() for name, value in quantized.state_dict().items()}


def gptq(model: Path, tokens: Any, asked: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return the weights that GPTQModel's 4 bits decode to, by name, read from what it saves."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=asked.group, device="cpu")
    loaded = GPTQModel.load(str(model), config)
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    loaded.quantize(windows, batch_size=1, backend=BACKEND.AUTO)
    with tempfile.TemporaryDirectory() as place:
        loaded.save(place)
        return decoded_gptq(Path(place))


def decoded_gptq(place: Path) -> dict[str, torch.Tensor]:
    """Decode every layer of a GPTQ checkpoint of 4 bits in its first format (zeros less one).

    Returns:
        weight -> float32 [rows, columns].
    """
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        stored |= load_file(file)
    decoded = {}
    for name in [key for key in stored if key.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes = unpacked(stored[name], 0)  # [columns, rows]
        zeros = unpacked(stored[f"{module}.qzeros"], 1) + 1  # [groups, rows]
        scales, group = stored[f"{module}.scales"].float(), stored[f"{module}.g_idx"].long()
        decoded[f"{module}.weight"] = ((codes - zeros[group]) * scales[group]).T.contiguous()
    return decoded


def unpacked(packed: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the eight 4-bit values of each int32, the lowest bits first, along an axis."""
    values = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 8
    return values.reshape(shape)


def main() -> None:
    """Quantize, and write the decoded checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("autoround", "gptq"))
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    tokens = torch.from_numpy(np.load(asked.tokens))
    run = autoround if asked.method == "autoround" else gptq
    write(asked.model, run(asked.model, tokens, asked), asked.output, asked.group)


def write(model: Path, decoded: dict[str, torch.Tensor], output: Path, group: int) -> None:
    """Write the decoded linear weights, in float32, into a copy of a model, and count their bits.

    Raises:
        SystemExit: a linear layer was left as it was.
    """
    from safetensors.torch import load_file

    linear = linear_weights(model)
    tensors = {name: value.float() for name, value in load_file(model / "model.safetensors").items()}
    same = [name for name in linear if name not in decoded or torch.equal(decoded[name], tensors[name])]
    if same:
        raise SystemExit(f"{len(same)} of {len(linear)} linear layers are as they were: {same[0]}")
    tensors |= {name: decoded[name].contiguous() for name in linear}
    copy_with(model, output, tensors)
    total = sum(bits.grouped(*value.shape, group) for value in linear.values())
    weights = sum(value.numel() for value in linear.values())
    (output / "bits.json").write_text(json.dumps({"bits": total / weights}))


if __name__ == "__main__":
    main()
