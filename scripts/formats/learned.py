"""Quantize a model with AutoRound or GPTQModel on given tokens, and write what that decodes to.

    learned.py autoround|gptq MODEL TOKENS.npy OUTPUT [--group N] [--iters N] [--batch N]

OUTPUT is a float32 checkpoint for nf4 eval, with bits.json beside the weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sources import finish


def autoround(model: Path, tokens: Any, place: Path, asked: argparse.Namespace) -> None:
    """Save what AutoRound's W4A16 makes, in GPTQ's layout."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    windows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens
    ]
    rounding = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), scheme="W4A16", group_size=asked.group,
        dataset=windows, nsamples=len(tokens), seqlen=tokens.shape[1], iters=asked.iters,
        batch_size=asked.batch, device_map="cpu",
    )  # fmt: skip
    rounding.quantize_and_save(str(place), format="auto_gptq")


def gptq(model: Path, tokens: Any, place: Path, asked: argparse.Namespace) -> None:
    """Save what GPTQModel's 4 bits make."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=asked.group, device="cpu")
    loaded = GPTQModel.load(str(model), config)
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    loaded.quantize(windows, batch_size=1, backend=BACKEND.AUTO)
    loaded.save(str(place))


def decoded(place: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Decode every layer of a GPTQ checkpoint of 4 bits in its first format (zeros less one).

    Returns:
        weight -> float32 [rows, columns]; bits of all codes, zeros and scales.  g_idx, which only
        an order of columns needs, is not counted.
    """
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(place.rglob("*.safetensors")):
        stored |= load_file(file)
    weights, size = {}, 0
    for name in [key for key in stored if key.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes = unpacked(stored[name], 0)  # [columns, rows]
        zeros = unpacked(stored[f"{module}.qzeros"], 1) + 1  # [groups, rows]
        scales, group = stored[f"{module}.scales"].float(), stored[f"{module}.g_idx"].long()
        weights[f"{module}.weight"] = ((codes - zeros[group]) * scales[group]).T
        parts = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        size += sum(8 * part.nbytes for part in parts)
    return weights, size


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
    model, output = asked.model.resolve(), asked.output.resolve()
    saved = output.with_name(f"{output.name}_saved")
    saved.mkdir(parents=True, exist_ok=True)
    os.chdir(saved)  # GPTQModel writes its logs where it is
    run = autoround if asked.method == "autoround" else gptq
    run(model, tokens, saved / "model", asked)
    weights, stored = decoded(saved / "model")
    finish(model, output, weights, stored, iterations=asked.iters, batch=asked.batch)


if __name__ == "__main__":
    main()
