#!/usr/bin/env python
"""Measure the CPU time of commands that answer at once: help, refusals, a small output.

    .venv/bin/python scripts/bench_startup.py [--runs 10] [--against COMMIT] [--work FOLDER]

Runs each command as a process of its own, compiled and in warm caches, and prints the median and
the spread of its user and system time. With --against the versions take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from built_commit import built, command

SIZE, MATRICES = 1024, 18
"""Rows and columns of the model's matrices, and how many it has: 38 MB, 10 MB in 4 bit."""


def commands(output: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return words and environment by title; `output` is looked at."""
    nowhere = str(output.parent / "nowhere")
    asked = {
        "--version": ["--version"],
        "--help": ["--help"],
        "quantize --help": ["quantize", "--help"],
        "a command that is none": ["nosuch"],
        "an option that is none": ["quantize", "--bogus"],
        "a number that is none": ["quantize", nowhere, "--blocksize", "x"],
        "inspect, no such path": ["inspect", nowhere],
        "quantize, no such path": ["quantize", nowhere, nowhere + "-out"],
        "verify, no such path": ["verify", nowhere],
        "dequantize, no such path": ["dequantize", nowhere, nowhere + "-out"],
        "attest, no such path": ["attest", nowhere],
        "inspect, 10 MB": ["inspect", str(output)],
        "inspect --json, 10 MB": ["inspect", str(output), "--json"],
        "verify, 10 MB": ["verify", str(output)],
    }
    completion = {
        "_NF4_COMPLETE": "complete_bash", "COMP_WORDS": "nf4 quantize --ta", "COMP_CWORD": "2"
    }  # fmt: skip
    return {title: (words, {}) for title, words in asked.items()} | {
        "a completion": ([], completion)
    }


def write_model(place: Path) -> None:
    """Write a model of random bf16 matrices."""
    place.mkdir()
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "BF16", "shape": [SIZE, SIZE],
            "data_offsets": [i * len(data), (i + 1) * len(data)],
        }
        for i in range(MATRICES)
    }  # fmt: skip
    text = json.dumps(header).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data * MATRICES)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (place / "config.json").write_text(json.dumps(config))


def run(folder: Path, words: list[str], more: dict[str, str]) -> float:
    """Return the seconds of CPU time of a command with the package of a folder."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | more
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command(folder), *words], env=environment, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2, 3) or "Traceback" in done.stderr:
        sys.exit(f"{words}: exit code {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cell(seconds: list[float]) -> str:
    """Return the median and the spread."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def table(places: dict[str, Path], work: Path, runs: int) -> None:
    """Print the CPU time of each command.

    Args:
        places: built packages, by the title of their column; the first makes the output.
        work: a folder to fill.
    """
    output = work / "output"
    write_model(work / "model")
    made = ["quantize", str(work / "model"), str(output), "--quiet"]
    run(next(iter(places.values())), made, {})
    print("| CPU time in s | " + " | ".join(places) + " |\n|---|" + "---|" * len(places))
    for title, (words, more) in commands(output).items():
        times: dict[str, list[float]] = {name: [] for name in places}
        for number in range(runs + 1):
            for name, folder in places.items():
                seconds = run(folder, words, more)
                if number:  # the first run warms the caches
                    times[name].append(seconds)
        print(f"| {title} | " + " | ".join(map(cell, times.values())) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="runs of each command")
    parser.add_argument("--against", metavar="COMMIT", help="a version to measure beside this one")
    parser.add_argument("--work", type=Path, help="a directory on the disk to use")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=options.work) as directory:
        work = Path(directory)
        places = {"now": built(None, work / "now")}
        if options.against:
            places[options.against] = built(options.against, work / "against")
        table(places, work, options.runs)


if __name__ == "__main__":
    main()
