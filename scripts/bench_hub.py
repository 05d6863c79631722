#!/usr/bin/env python
"""Measure conversions from a Hub to a Hub, against the local server of the tests.

    .venv/bin/python scripts/bench_hub.py --work /some/disk [--quick]

1. `nf4 quantize ORG/NAME --plan` of models as large as published ones: the weights are sparse
   files, of which a plan reads the headers only.
2. A Llama-1B-shaped checkpoint (3 GB in 9 files) from the Hub to the Hub under --disk: the most
   bytes that lay on the disk, seen from outside, and the peak memory.
3. The proof of what was pushed, under the same bound.
4. How much of fetching, converting and uploading overlaps: the same over links of several speeds,
   beside the time that the link alone needs.

The server runs in a process of its own on the same machine and takes part of its processors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NF4 = str(Path(sys.executable).with_name("nf4"))

LLAMA_1B = (2048, 8192, 16, 128256, 512)
PUBLISHED = {  # name: (hidden, intermediate, layers, vocabulary, key/value width), files
    "llama-8b": ((4096, 14336, 32, 128256, 1024), 4),
    "llama-70b": ((8192, 28672, 80, 128256, 1024), 30),
    "llama-405b": ((16384, 53248, 126, 128256, 1024), 191),
}


def shapes_of(h: int, i: int, layers: int, vocab: int, kv: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        for name, shape in {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i), "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }.items():  # fmt: skip
            shapes[f"{layer}{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (h,), "lm_head.weight": (vocab, h)}


def make(root: Path, size: tuple[int, int, int, int, int], files: int, sparse: bool) -> int:
    """A checkpoint in about equal files, made by a process of its own; returns its bytes.

    The peak memory of a process starts from its parent's, which therefore imports nothing large.
    """
    code = (
        "import bench_hub, pathlib; print(bench_hub.write("
        f"pathlib.Path({str(root)!r}), {size}, {files}, {sparse}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", stdout=subprocess.PIPE, check=True
    )
    return int(done.stdout)


def write(root: Path, size: tuple[int, int, int, int, int], files: int, sparse: bool) -> int:
    """The same in this process."""
    import numpy as np  # noqa: PLC0415 - see `make`

    root.mkdir(parents=True)
    h, i, layers, vocab, _ = size
    shapes = shapes_of(*size)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled > total / files * len(parts) and len(parts) < files:
            parts.append([])
        parts[-1].append(name)
        filled += 2 * int(np.prod(shape))
    random = np.random.default_rng(0)
    pool = (random.standard_normal(1 << 24, np.float32) * 0.02).view(np.uint32)
    pool = ((pool + 0x8000) >> 16).astype(np.uint16)
    weight_map, pieces = {}, itertools.count()
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, offset = {}, 0
        for name in names:
            nbytes = 2 * int(np.prod(shapes[name]))
            header[name] = {
                "dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + nbytes]
            }  # fmt: skip
            offset += nbytes
        text = json.dumps(header).encode()
        with (root / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                out.truncate(8 + len(text) + offset)
                continue
            for start in range(0, offset // 2, pool.size):
                # Other low bits in each: a storage that knows chunks again finds none twice.
                piece = pool[: min(pool.size, offset // 2 - start)] ^ np.uint16(next(pieces) % 128)
                out.write(piece.tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h,
        "intermediate_size": i, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": h // 32, "vocab_size": vocab,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    return total


@contextmanager
def serving(models: Path, rate: float | None = None) -> Iterator[dict[str, str]]:
    """The environment of a process that speaks to a Hub with these models.

    Args:
        rate: bytes a second of every connection.
    """
    command = [sys.executable, "-m", "hub_server", str(models), "0", *([str(rate)] if rate else [])]
    server = subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        settings = dict(part.split("=", 1) for part in server.stdout.readline().split()[1:])
        yield {**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, **settings}
    finally:
        server.kill()
        server.wait()


class Watch:
    """The most bytes that the files of a directory had together."""

    def __init__(self, root: Path) -> None:
        self.root, self.most, self.stop = root, 0, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        while not self.stop.wait(0.005):
            total = 0
            for directory, _, names in os.walk(self.root):
                for name in names:
                    try:
                        total += os.lstat(os.path.join(directory, name)).st_size
                    except FileNotFoundError:
                        continue
            self.most = max(self.most, total)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def run(arguments: list[str], environment: dict[str, str], place: Path) -> tuple[float, int, int]:
    """(seconds, peak memory, most on the disk, in bytes) of a command, in an empty directory and
    with an empty cache."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "run").mkdir(parents=True)
    started = time.perf_counter()
    environment = {**environment, "HF_HOME": str(place / "home"), "NF4_HEARTBEAT": "0"}
    with Watch(place) as watch:
        process = subprocess.Popen(
            [NF4, *arguments], cwd=place / "run", env=environment, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"nf4 {' '.join(arguments)} failed")
    return seconds, usage.ru_maxrss * 1024, watch.most


def plans(work: Path) -> None:
    models = work / "sparse"
    print("| model | bytes | files | `--plan`, seconds (median of 3) |\n|---|---|---|---|")
    for name, (size, files) in PUBLISHED.items():
        total = make(models / "org" / name, size, files, sparse=True)
        with serving(models) as environment:
            arguments = ["quantize", f"org/{name}", "--plan", "--json"]
            times = [run(arguments, environment, work / "place")[0] for _ in range(3)]
        print(f"| {name} | {total:,} | {files} | {statistics.median(times):.2f} |")
        shutil.rmtree(models)


def journeys(work: Path, quick: bool) -> None:
    models = work / "models"
    total = make(models / "org" / "model", LLAMA_1B, 10, sparse=False)
    print(f"\n{total:,} bytes in 9 files, two connections at a time\n")
    print("| link | what | seconds | the link alone | most on the disk | peak memory |")
    print("|---|---|---|---|---|---|")
    bounded = ["quantize", "org/model", "--disk", "1200MB", "--push-to"]
    files = ["--max-shard-size", "100MB"]
    local, memory, _ = run(
        ["quantize", str(models / "org" / "model"), "out"], dict(os.environ), work / "place"
    )
    print(f"| none | local to local | {local:.1f} | | | {memory / 1e6:.0f} MB |")
    for rate in (None, 100e6) if quick else (None, 200e6, 50e6):
        with serving(models, rate) as environment:
            for what, arguments in {
                "to the cache, then to OUTPUT": ["quantize", "org/model", "out"],
                "--disk 3GB to OUTPUT": ["quantize", "org/model", "out", "--disk", "3GB"],
                "--disk 1200MB, pushed by LFS": [*bounded, "me/out", *files],
                "--disk 1200MB, pushed by Xet": [*bounded, "me/other", *files],
                "that one verified, --disk 1200MB": [
                    "verify", "me/out", "--source", "org/model", "--disk", "1200MB"
                ],
            }.items():  # fmt: skip
                settings = dict(environment)
                if what.endswith("by Xet"):
                    del settings["HF_HUB_DISABLE_XET"]
                seconds, memory, most = run(arguments, settings, work / "place")
                alone = f"{total / (2 * rate):.1f}" if rate else ""
                name = f"2 x {rate / 1e6:.0f} MB/s" if rate else "loopback"
                print(
                    f"| {name} | {what} | {seconds:.1f} | {alone} | {most / 1e6:,.0f} MB | "
                    f"{memory / 1e6:.0f} MB |", flush=True,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work / "nf4-bench-hub"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        plans(work)
        journeys(work, arguments.quick)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
