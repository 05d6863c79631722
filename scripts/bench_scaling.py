#!/usr/bin/env python
"""Say what more processors would give: measured stages, and a model of them that is checked here.

    .venv/bin/python scripts/bench_scaling.py --work /some/disk [--runs 5]

A conversion reads, digests, encodes and writes.  Each of these can be done by any number of
threads, but the digests of a file take its bytes in order: they are a chain.  The script measures
the seconds that each stage takes for a GB of bf16 source on one processor, and converts with one
worker and with every number of workers up to that of the processors.  The model says

    seconds a GB = the larger of (all stages / workers, the chain / threads of BLAKE3)

and is printed beside what was measured, and for more workers than there are processors: those rows
are computed, and say so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_convert import NF4, fresh, make, processor, run, warm

from nf4cli.checkpoint.digest import FileDigest, hash_threads, new_tensor_hash
from nf4cli.checkpoint.file_io import write_at
from nf4cli.engines.cpu import CpuEngine

CHUNK = 4 << 20  # bytes, as a worker reads them
SMALL = (64, 128, 2, 512, 64, 1, 0)
SHAPE = (2048, 8192, 16, 128256, 512, 1, 0)  # of Llama-1B, 2.47 GB


def seconds_a_gb(work: Callable[[], object], nbytes: int, runs: int) -> float:
    """Return the processor seconds that a stage takes for a GB of source, the median of runs."""
    found = []
    for _ in range(runs + 1):
        start = time.process_time()
        work()
        found.append((time.process_time() - start) / nbytes * 1e9)
    return statistics.median(found[1:])


def stages(source: Path, out: Path, runs: int) -> dict[str, float]:
    """Return the seconds a GB of each stage, on one processor."""
    engine, n = CpuEngine(), CHUNK // 2
    data, packed = np.empty(CHUNK, np.uint8), np.empty(n // 2, np.uint8)
    absmax = np.empty(n // 64, np.float32)
    codes, nested = np.empty(absmax.size, np.uint8), np.empty(absmax.size // 256, np.float32)
    places = range(1 << 20, 64 * CHUNK, CHUNK)  # more than a cache holds
    with source.open("rb", buffering=0) as file, out.open("wb", buffering=0) as target:

        def read() -> None:
            for place in places:
                os.preadv(file.fileno(), [data], place)

        def write() -> None:
            target.truncate(0)  # an output's pages are new
            for place in places:
                write_at(target.fileno(), memoryview(packed), place // 4)

        read()
        encode = (data, "BF16", 64, "nf4", packed, absmax)
        engine.quantize(*encode)
        alone = {
            "read": (read, len(places) * CHUNK),
            "BLAKE3 of the source": (lambda: FileDigest("blake3").update(data), CHUNK),
            "XXH3 of its tensors": (lambda: new_tensor_hash().update(memoryview(data)), CHUNK),
            "encode": (lambda: engine.quantize(*encode), CHUNK),
            "double quantization": (
                lambda: engine.nested_quantize(absmax, 0.5, codes, nested), CHUNK
            ),
            "BLAKE3 of the output": (lambda: FileDigest("blake3").update(packed), CHUNK),
            "write": (write, len(places) * CHUNK),
        }  # fmt: skip
        return {name: seconds_a_gb(*stage, runs) for name, stage in alone.items()}


def modelled(cost: dict[str, float], workers: int) -> float:
    """Return the seconds a GB that the model gives for a number of workers."""
    chain = cost["BLAKE3 of the source"] / hash_threads(workers)
    return max(sum(cost.values()) / workers, chain)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    work = options.work / "nf4-bench-scaling"
    shutil.rmtree(work, ignore_errors=True)
    source = make(work / "llama-1b", *SHAPE)
    size, cores = warm(source), len(os.sched_getaffinity(0))
    cost = stages(source / "model.safetensors", work / "packed", options.runs)
    small = make(work / "small", *SMALL)

    def wall(root: Path, workers: int) -> float:
        """Return the median of conversions; the disk is no processor's matter: without syncs."""
        words = ("--workers", str(workers), "--no-fsync", "--quiet")
        out = work / "out"
        return statistics.median(
            run(NF4, "quantize", str(root), fresh(out), *words)[0] for _ in range(options.runs)
        )

    start_up = wall(small, 1)
    measured = {
        workers: wall(source, workers) for workers in (w for w in (1, 2, 4, 8, 16) if w <= cores)
    }
    shutil.rmtree(work)
    print(f"{processor()}, {cores} processors; {size / 1e9:.2f} GB of bf16\n")
    print("| stage | seconds a GB of source |\n|---|---|")
    print("\n".join(f"| {name} | {seconds:.3f} |" for name, seconds in cost.items()))
    print(f"| all of them | {sum(cost.values()):.3f} |\n")
    print("| workers | threads of BLAKE3 | model | measured, without start-up |\n|---|---|---|---|")
    for workers in (1, 2, 4, 8, 16):
        seconds = modelled(cost, workers)
        speed = f"{seconds:.3f} s a GB, {1 / seconds:.1f} GB/s"
        row = f"| {workers} | {hash_threads(workers)} | {speed} | "
        if workers in measured:
            found = (measured[workers] - start_up) / size * 1e9
            print(f"{row}{found:.3f} s a GB, {1 / found:.1f} GB/s |")
        else:
            print(f"{row}not measured: computed |")


if __name__ == "__main__":
    main()
