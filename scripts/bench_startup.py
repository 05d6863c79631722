#!/usr/bin/env python
"""Measure the CPU time of commands that answer at once: help, refusals, a small output.

    .venv/bin/python scripts/bench_startup.py [--runs 10] [--against COMMIT] [--work FOLDER]

Runs each command as a process of its own, compiled and in warm caches, and prints the median and
the spread of its user and system time. With --against the versions take turns; the older one
uses the engine's library of this one, which it must be able to load.
"""

from __future__ import annotations

import argparse
import compileall
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

import nf4cli.engines

ROOT = Path(__file__).parent.parent
START = "from nf4cli.__main__ import main; main()"
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


def package(place: Path, commit: str | None) -> Path:
    """Return a folder with the compiled package: of a commit, or None for the working tree's."""
    place.mkdir()
    if commit is None:
        shutil.copytree(ROOT / "nf4cli", place / "nf4cli")
    else:
        packed = subprocess.run(
            ["git", "archive", commit, "nf4cli"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(place, filter="data")
    library = Path(nf4cli.engines.__file__).parent / "_nf4.so"
    shutil.copy(library, place / "nf4cli" / "engines" / "_nf4.so")
    compileall.compile_dir(place, quiet=1)
    return place


def run(folder: Path, words: list[str], more: dict[str, str]) -> float:
    """Return the seconds of CPU time of a command with the package of a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"} | more
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", START, *words], env=environment, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2, 3) or "Traceback" in done.stderr:
        sys.exit(f"{words}: exit code {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cell(seconds: list[float]) -> str:
    """Return the median and the spread."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="runs of each command")
    parser.add_argument("--against", metavar="COMMIT", help="a version to measure beside this one")
    parser.add_argument("--work", type=Path, help="a directory on the disk to use")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=options.work) as work:
        places = {"now": package(Path(work) / "now", None)}
        if options.against:
            places[options.against] = package(Path(work) / "against", options.against)
        output = Path(work) / "output"
        write_model(Path(work) / "model")
        run(places["now"], ["quantize", str(Path(work) / "model"), str(output), "--quiet"], {})
        print("| CPU time in s | " + " | ".join(places) + " |\n|---|" + "---|" * len(places))
        for title, (words, more) in commands(output).items():
            times: dict[str, list[float]] = {name: [] for name in places}
            for number in range(options.runs + 1):
                for name, folder in places.items():
                    seconds = run(folder, words, more)
                    if number:  # the first run warms the caches
                        times[name].append(seconds)
            print(f"| {title} | " + " | ".join(map(cell, times.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
