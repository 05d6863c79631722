"""Part 5 of scripts/gpu_day: calibration of a model of 1B shape on the GPU, beside the CPU's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from report import Part, main
from running import Shape, fresh, last_json, llama
from running import run as run_command

VOCABULARY = 2048  # what the tests' tokenizer knows is in it
SHAPE = Shape(2048, 8192, 16, VOCABULARY, True)
SHORT = Shape(2048, 8192, 2, VOCABULARY, True)
"""Two layers of the same, for the CPU to keep up."""
TINY = Shape(128, 256, 2, 512, True)


def model_of(part: Part, name: str, shape: Shape) -> Path:
    """Write a checkpoint with a tokenizer."""
    import text_models

    root = llama(part.work / name, shape)
    text_models.tokenizer().save_pretrained(root)
    return root


def calibrate(part: Part, source: Path, text: Path, device: str, tokens: int, method: str) -> Any:
    """Calibrate once; returns figures, with the losses and the importance of every weight."""
    from nf4cli.checkpoint.importance_file import load

    name = f"{source.name}-{device}-{method}"
    output, kept = fresh(part.work / name), part.work / f"{name}.dat"
    emulated = ["--emulate", part.emulated] if part.emulated else []
    length = min(512, tokens // 2)
    done = run_command(
        part, sys.executable, Path(__file__).with_name("calibrating.py"), *emulated, "quantize",
        source, output, "--engine", "cpu" if device == "cpu" else "cuda", "--calibration", text,
        "--calibration-tokens", tokens, "--calibration-length", length, "--method", method,
        "--save-importance", kept, "--quiet", *(("--device", "cpu") if device == "cpu" else ()),
    )  # fmt: skip
    found = load(kept)
    return {
        "seconds": done.seconds, "gpu_memory": last_json(done.out)["gpu_memory"],
        "losses": found.about["losses"], "columns": found.columns,
    }  # fmt: skip


def difference(a: Any, b: Any) -> tuple[float, float]:
    """Return the largest relative difference of losses, and of columns' importance."""
    losses = max(
        abs(a["losses"][name] - b["losses"][name]) / max(b["losses"][name], 1e-9)
        for name in b["losses"]
    )
    columns = max(
        float(np.max(np.abs(a["columns"][name] - there) / np.maximum(there, 1e-3 * there.mean())))
        for name, there in b["columns"].items()
    )
    return losses, columns


def told(found: Any) -> str:
    mean = float(np.mean(list(found["losses"].values())))
    memory = f", {found['gpu_memory'] / 1e9:.2f} GB of the GPU" if found["gpu_memory"] else ""
    return (
        f"{found['seconds']:.1f} s{memory}, mean loss {mean:.5f} of {len(found['losses'])} weights"
    )


def beside_the_cpu(part: Part, text: Path, shape: Shape, tokens: int) -> None:
    """Calibrate a short model on both, and compare."""
    source = model_of(part, "short", shape)
    for method in ("gptq", "yaqa") if part.dry else ("rtn", "gptq", "yaqa"):
        with part.report.step(f"calibration, {method}, GPU beside CPU"):
            found = {d: calibrate(part, source, text, d, tokens, method) for d in ("gpu", "cpu")}
            title = f"calibration, {method}, {shape.layers} layers, {tokens:,} tokens"
            for device, figures in found.items():
                part.report.row(f"{title}, {device}", told(figures))
            losses, columns = difference(found["gpu"], found["cpu"])
            part.report.row(
                f"{title}: largest relative difference between GPU and CPU",
                f"loss {losses:.2g}, importance {columns:.2g}",
            )
            part.report.figures({f"difference {method}": {"loss": losses, "importance": columns}})


def whole(part: Part, text: Path, shape: Shape, tokens: int) -> None:
    """Calibrate the whole shape on the GPU."""
    source = model_of(part, "whole", shape)
    for method in ("rtn", "gptq", "yaqa"):
        with part.report.step(f"calibration, {method}, whole"):
            found = calibrate(part, source, text, "gpu", tokens, method)
            title = f"calibration, {method}, {shape.layers} layers, {tokens:,} tokens, on the GPU"
            part.report.row(title, told(found))
            part.report.figures({title: {k: found[k] for k in ("seconds", "gpu_memory", "losses")}})


def run(part: Part) -> None:
    import text_models

    text = part.work / "text.txt"
    text.write_text(text_models.text(500 if part.dry else 40_000))
    if part.dry:
        beside_the_cpu(part, text, TINY, 128)
        return
    with part.report.step("calibration beside the CPU"):
        beside_the_cpu(part, text, SHORT, 4096)
    whole(part, text, SHAPE, 32_768)


if __name__ == "__main__":
    main(run)
