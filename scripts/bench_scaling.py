#!/usr/bin/env python
"""Say what more processors would give: measured stages, and a model of them that is checked here.

    .venv/bin/python scripts/bench_scaling.py --work /some/disk [--runs 5]

A conversion reads, digests, encodes and writes.  Each of these can be done by any number of
threads, but the digests of a file take its bytes in order: they are a chain.  The script measures
the processor seconds that each stage takes for a GB of bf16 source, and converts with one worker
and with every number of workers up to that of the processors.  The model says

    seconds a GB = the larger of (all stages / workers, the chain / threads of BLAKE3)

and is printed beside what was measured, and for more workers than there are processors: those rows
are computed, and say so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path

from bench_convert import NF4, PROFILE, fresh, make, processor, run, script, warm

from nf4cli.checkpoint.digest import hash_threads

_OF_SOURCE = 0.78  # of the bytes of both files: the output has 0.28 of the source's
SMALL = (64, 128, 2, 512, 64, 1, 0)
SHAPE = (2048, 8192, 16, 128256, 512, 1, 0)  # of Llama-1B, 2.47 GB


def stages(source: Path, out: Path, runs: int) -> dict[str, float]:
    """Return the processor seconds that each stage of a conversion takes for a GB of source.

    They are taken within conversions: a stage alone, over bytes that are in the cache, takes half.
    """
    code = PROFILE
    for kind, label in (("FileDigest", "BLAKE3"), ("TensorDigests", "XXH3")):
        code = code.replace(
            f'watch(digest.{kind}, "update", "hash")', f'watch(digest.{kind}, "update", "{label}")'
        )
    size, found = warm(source), []
    for _ in range(runs):
        found.append(json.loads(script(code, str(source), fresh(out)))["spent"])
    return {name: statistics.median(spent[name] for spent in found) / size * 1e9
            for name in found[0]}  # fmt: skip


def modelled(cost: dict[str, float], workers: int) -> float:
    """Return the seconds a GB that the model gives for a number of workers."""
    chain = cost["BLAKE3"] * _OF_SOURCE / hash_threads(workers)
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
    cost = stages(source, work / "out", options.runs)
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
