"""Calibrate models on the CPU and on the other device, and print how far the results are apart.

A process of its own: torch counts its devices when it first goes back through a graph.
Arguments: a folder to work in, then methods and names of text_models, joined by commas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import other_device
import text_models
import torch
import transformers
from tiny_models import V

from nf4cli.engines.cpu import CpuEngine
from nf4cli.format.config import QuantConfig
from nf4cli.quality.calibration.passes import Calibration, Settings
from nf4cli.quality.calibration.walk import Walk

LINEARS = torch.nn.Linear, transformers.pytorch_utils.Conv1D


def pass_over(root: Path, scratch: Path, method: str, device: str) -> Calibration:
    config = transformers.AutoConfig.from_pretrained(root)
    whole = getattr(transformers, config.architectures[0]).from_pretrained(root)
    names = [f"{n}.weight" for n, m in whole.named_modules() if isinstance(m, LINEARS)]
    seen = torch.randint(5, V - 5, (5, 16), generator=torch.Generator().manual_seed(2)).numpy()
    found = Calibration(
        root, seen, scratch, names, QuantConfig(scale="search"), CpuEngine(), Settings(method), {},
        device=device,
    )  # fmt: skip
    found.run()
    return found


def refuses() -> bool:
    """Whether the device refuses a tensor of the CPU, as a GPU does."""
    try:
        torch.ones(2, 3).to(other_device.DEVICE) + torch.ones(2, 3)
    except RuntimeError as error:
        return "same device" in str(error)
    return False


def main(place: Path, methods: list[str], names: list[str]) -> None:
    library = other_device.register()
    apart: dict[str, dict[str, float]] = {}
    for name in names:
        root = text_models.make(name, place / name)
        for method in methods:
            here, there = (
                pass_over(root, place / f"{name}-{method}-{device}", method, device)
                for device in ("cpu", other_device.DEVICE)
            )
            losses = [abs(there.losses[k] - v) / v for k, v in here.losses.items()]
            columns = [
                float(np.abs(there.importance[k] - v).max() / v.max())
                for k, v in here.importance.items()
            ]
            apart[f"{name} {method}"] = {
                "losses": float(np.median(losses)), "importance": float(np.median(columns)),
                "weights": len(there.losses),
            }  # fmt: skip
    walk = Walk(place / names[0], place / "offload", other_device.DEVICE)
    walk.record(np.arange(5, 13))
    with walk.tail() as after_blocks:
        width = walk._model.config.hidden_size
        logits = after_blocks(torch.ones(1, 4, width).to(other_device.DEVICE))
    found = {"refuses": refuses(), "logits": [list(logits.shape), logits.device.type]}
    print(json.dumps({"apart": apart, **found}))
    assert library


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
