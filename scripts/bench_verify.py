#!/usr/bin/env python
"""Measure `nf4 verify`: against hashing the same files, and its memory.

    .venv/bin/python scripts/bench_verify.py --work /some/disk [--runs 9]

Makes a bf16 checkpoint of random weights in the shape of 24 layers of Llama-3-8B (11 GB), quantizes
it into one file and into shards of 1 GB, and times in turn, the page cache warm: `nf4 verify OUT`;
a process that does nothing but digest the same files through nf4cli.checkpoint.digest.digest_file,
one thread a file; and one that maps each file and lets blake3 use every processor, as `b3sum` does.
Then memory: of these runs, and of 20,000 tiny tensors.  Prints a table for docs/measurements.md.

Peak memory is the kernel's ru_maxrss of each command, which starts from its parent's: this process
imports nothing large.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from bench_convert import MAKE, NF4, run, spread

HASH = """
import sys, threading
from pathlib import Path
from nf4cli.checkpoint.digest import digest_file
threads = [threading.Thread(target=digest_file, args=(Path(name), "blake3"))
           for name in sys.argv[1:]]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
MAPPED = """
import sys
from blake3 import blake3
for name in sys.argv[1:]:
    blake3(max_threads=blake3.AUTO).update_mmap(name).hexdigest()
"""
INSIDE = """
import json, statistics, sys, threading, time
from pathlib import Path
from nf4cli import engines
from nf4cli.checkpoint.digest import digest_file
from nf4cli.planning.resources import make_resources
from nf4cli.proof.verify import verify
import os
out, runs = Path(sys.argv[1]), int(sys.argv[2])
engine = engines.load("cpu")
resources = make_resources(engine, None, None, len(os.sched_getaffinity(0)))
def digest():
    threads = [threading.Thread(target=digest_file, args=(file, "blake3"))
               for file in out.glob("*.safetensors")]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
ratios, cpu = [], []
for _ in range(runs):
    times = []
    for work in (digest, lambda: verify(out, None, engine, resources)):
        start, used = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - start, time.process_time() - used))
    ratios.append(times[0][0] / times[1][0])
    cpu.append(times[0][1] / times[1][1])
print(json.dumps([statistics.median(ratios), statistics.median(cpu)]))
"""
MANY = """
import json, sys
import numpy as np
from safetensors.numpy import save_file
rng = np.random.default_rng(0)
save_file({f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((4, 64), np.float32)
           for i in range(20000)}, sys.argv[1] + "/model.safetensors")
json.dump({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
           "num_hidden_layers": 20000, "torch_dtype": "float32"},
          open(sys.argv[1] + "/config.json", "w"))
"""


def python(code: str, *arguments: object) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak bytes) of a script."""
    return run(sys.executable, "-I", "-c", code, *map(str, arguments))


def compare(out: Path, label: str, runs: int) -> list[str]:
    """Rows of the table for one output."""
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    ways = {
        "`nf4 verify`": lambda: run(NF4, "verify", str(out)),
        "`digest_file`, a thread a file": lambda: python(HASH, *files),
        "mapped, every processor, as `b3sum`": lambda: python(MAPPED, *files),
    }
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    for _ in range(runs + 1):  # the first of each warms up
        for name, way in ways.items():
            seen[name].append(way())
    walls = {name: [r[0] for r in results[1:]] for name, results in seen.items()}
    verify, *others = ways
    rows = []
    for name, results in seen.items():
        speed = size / 1e9 / statistics.median(walls[name])
        cpu = statistics.median(r[1] for r in results[1:])
        peak = max(r[2] for r in results)
        rows.append(
            f"| {label} | {name} | {spread(walls[name])} | {cpu:.2f} s | {speed:.2f} GB/s | "
            f"{peak / 1e6:.0f} MB |"
        )
    for name in others:
        ratio = statistics.median(b / a for a, b in zip(walls[verify], walls[name], strict=True))
        rows.append(
            f"| {label} | speed of `nf4 verify` / {name}, median of pairs | {ratio:.0%} | | | |"
        )
    done = subprocess.run(
        [sys.executable, "-I", "-c", INSIDE, str(out), str(runs)], check=True, capture_output=True
    )
    wall, cpu = json.loads(done.stdout)
    rows.append(
        f"| {label} | speed of verify / `digest_file` in one process, without start-up, median of "
        f"pairs | {wall:.0%} | {cpu:.0%} | | |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each, in turn")
    options = parser.parse_args()
    work = options.work / "nf4-bench-verify"
    shutil.rmtree(work, ignore_errors=True)
    source, many = work / "source", work / "many"
    for directory in (source, many):
        directory.mkdir(parents=True)
    shape = ("4096", "14336", "24", "32000", "1024", "0", "0")
    subprocess.run([sys.executable, "-c", MAKE, str(source), *shape], check=True)
    rows = []
    for label, options_of in (("one file", ()), ("shards", ("--max-shard-size", "1GB"))):
        out = work / label.replace(" ", "-")
        subprocess.run([NF4, "quantize", str(source), str(out), "-q", *options_of], check=True)
        rows += compare(out, label, options.runs)
    wall, _, peak = run(NF4, "verify", str(out), "--source", str(source))
    rows.append(f"| shards | `nf4 verify --source` | {wall:.2f} s | | | {peak / 1e6:.0f} MB |")
    wall, _, peak = run(NF4, "verify", str(out), "--sample", "1%")
    rows.append(f"| shards | `nf4 verify --sample 1%` | {wall:.2f} s | | | {peak / 1e6:.0f} MB |")
    subprocess.run([sys.executable, "-c", MANY, str(many)], check=True)
    out = work / "many-out"
    subprocess.run([NF4, "quantize", str(many), str(out), "-q"], check=True)
    for arguments in ((), ("--source", str(many))):
        wall, _, peak = run(NF4, "verify", str(out), *arguments)
        name = " ".join(["nf4 verify", *(a for a in arguments if a.startswith("--"))])
        rows.append(
            f"| 20,000 weights of 256 | `{name}` | {wall:.2f} s | | | {peak / 1e6:.0f} MB |"
        )
    shutil.rmtree(work)
    print("| what | by | time | CPU time | speed | peak memory |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
