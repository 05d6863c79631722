#!/usr/bin/env python
"""Measure the CPU codec of this checkout beside that of another commit, in one process.

    .venv/bin/python scripts/bench_codec.py --against COMMIT [--compiler clang++] [--runs 15]

Builds both libraries, and first checks that every output is the same to the byte.  Then times them
in turn, on one core and in CPU time, and prints how many times as fast the new one is: the median
of the pairs, and the lowest and highest.  With `--compiler`, builds this checkout a second time
with that compiler, and compares the two as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from built_commit import built, library

from nf4cli.engines import cpu
from nf4cli.engines.protocol import GRANULE, STATS, Codes
from nf4cli.format import codebook
from nf4cli.format.dtypes import ITEMSIZE

DTYPES = ("BF16", "F16", "F32")
ELEMENTS = 1 << 18
"""Of a timed call: what it reads and writes stays in the cache."""
HARD_ABSMAX = np.array([np.inf, np.nan, -np.nan, -1, 0, 1e-45, 1e-38, 3e38, 7e4], np.float32)
"""What a file may hold."""
LEAST_CALL = 0.01
"""CPU seconds of one measurement: calls are repeated until it takes so long."""


def engines(library: Path) -> dict[str, cpu.CpuEngine]:
    """Return the engine of each instruction set of a library."""
    cpu.LIBRARY = library
    cpu._library.cache_clear()
    return {isa: cpu.CpuEngine(isa) for isa in cpu.available()}


def elements(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return finite float32 values in a dtype, as bytes."""
    if dtype == "F32":
        raw = values
    elif dtype == "F16":
        raw = np.clip(values, -65504, 65504).astype(np.float16)
    else:
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.frombuffer(raw.tobytes(), np.uint8)


@dataclass(frozen=True)
class Job:
    """A call of an engine.

    Attributes:
        name: what is done.
        call: runs it, given an engine.
        outputs: what it writes.
    """

    name: str
    call: Callable[[cpu.CpuEngine], object]
    outputs: tuple[np.ndarray, ...]


def encoding(values: np.ndarray, dtype: str, blocksize: int, quant_type: str) -> Job:
    """Return the quantization of values, error sums included."""
    source, n = elements(values, dtype), values.size
    packed = np.empty((n + 1) // 2, np.uint8)
    absmax = np.empty(-(-n // blocksize), np.float32)
    stats = np.empty((-(-n // GRANULE), STATS))

    def call(engine: cpu.CpuEngine) -> None:
        stats[:] = engine.quantize(source, dtype, blocksize, quant_type, packed, absmax)

    return Job(f"{quant_type} encode {dtype} / {blocksize}", call, (packed, absmax, stats))


def decoding(n: int, dtype: str, blocksize: int) -> Job:
    """Return the dequantization of random codes."""
    random = np.random.default_rng(2)
    packed = random.integers(0, 256, (n + 1) // 2, np.uint8)
    absmax = random.uniform(0.01, 4.0, -(-n // blocksize)).astype(np.float32)
    absmax[3::97] = np.resize(HARD_ABSMAX, absmax[3::97].size)
    out = np.empty(n * ITEMSIZE[dtype], np.uint8)

    def call(engine: cpu.CpuEngine) -> None:
        engine.dequantize(packed, n, blocksize, "nf4", absmax, dtype, out)

    return Job(f"nf4 decode {dtype} / {blocksize}", call, (out,))


def nesting(n: int) -> Job:
    """Return the double quantization of an absmax vector of n."""
    absmax = np.abs(np.random.default_rng(3).standard_normal(n)).astype(np.float32) + 1
    codes = np.empty(n, np.uint8)
    nested_absmax = np.empty(-(-n // codebook.NESTED_BLOCKSIZE), np.float32)

    def call(engine: cpu.CpuEngine) -> None:
        engine.nested_quantize(absmax, float(np.float32(1.8)), codes, nested_absmax)

    return Job("nested encode", call, (codes, nested_absmax))


def code_source(n: int) -> Job:
    """Return the decoding of 4-bit codes that a checkpoint stores, in rows of 1024."""
    source = np.random.default_rng(4).integers(0, 256, n // 2, np.uint8)
    out = np.empty(2 * n, np.uint8)
    scale = np.full(n // 32, 0.5, np.float32)
    codes = Codes(0, 1024, scale, (1, 32), "e2m1")
    return Job("e2m1 decode BF16", lambda e: e.decode_codes(source, codes, out, "BF16"), (out,))


def jobs() -> list[Job]:
    """Return what is timed."""
    values = np.random.default_rng(1).standard_normal(ELEMENTS).astype(np.float32)
    work = [encoding(values, dtype, 64, "nf4") for dtype in DTYPES]
    work.append(encoding(values, "BF16", 64, "fp4"))
    work.append(encoding(values, "BF16", 128, "nf4"))
    work += [decoding(ELEMENTS, dtype, 64) for dtype in DTYPES]
    return [*work, nesting(ELEMENTS // 2), code_source(ELEMENTS)]


def checks() -> Iterator[Job]:
    """Yield what is compared: each dtype, blocksize and table, tails, and values of every size."""
    random = np.random.default_rng(5)
    for n in (1, 33, 64, 4097, 2 * GRANULE + 77):
        normal = random.standard_normal(n)
        wide = (normal * 2.0 ** random.integers(-140, 120, n)).astype(np.float32)
        sparse = np.where(random.random(n) < 0.02, normal, 0).astype(np.float32)
        for blocksize in codebook.BLOCKSIZES:
            for dtype in DTYPES:
                yield decoding(n, dtype, blocksize)
                for quant_type in codebook.QUANT_TYPES:
                    for values in (normal.astype(np.float32), wide, sparse):
                        yield encoding(values, dtype, blocksize, quant_type)
        yield nesting(n)


def compare(name: str, old: cpu.CpuEngine, new: cpu.CpuEngine) -> None:
    """Raise SystemExit at the first output that differs."""
    for job in [*checks(), *jobs()]:
        job.call(old)
        expected = [output.tobytes() for output in job.outputs]
        for output in job.outputs:
            output.view(np.uint8)[:] = 0xA5
        job.call(new)
        if expected != [output.tobytes() for output in job.outputs]:
            raise SystemExit(f"{name}: {job.name} differs")


def seconds(job: Job, engine: cpu.CpuEngine, calls: int) -> float:
    """Return the CPU seconds of a call."""
    start = time.thread_time()
    for _ in range(calls):
        job.call(engine)
    return (time.thread_time() - start) / calls


def measure(job: Job, old: cpu.CpuEngine, new: cpu.CpuEngine, runs: int) -> str:
    """Return a line: how many times as fast the new engine is."""
    seconds(job, old, 2)
    calls = max(1, round(LEAST_CALL / seconds(job, new, 3)))
    pairs = [(seconds(job, old, calls), seconds(job, new, calls)) for _ in range(runs)]
    ratios = [before / after for before, after in pairs]
    each = [statistics.median(side) * 1e6 for side in zip(*pairs, strict=True)]
    return (
        f"{job.name:24} {each[0]:9.1f} us {each[1]:9.1f} us   "
        f"x {statistics.median(ratios):5.2f}  ({min(ratios):.2f}..{max(ratios):.2f})"
    )


def table(title: str, old: Path, new: Path, runs: int) -> None:
    """Check two libraries against each other, and print the ratios for each instruction set."""
    before, after = engines(old), engines(new)
    for isa in after:
        against = isa if isa in before else "generic"
        compare(isa, before[against], after[isa])
        print(f"\n{title}: {isa} (before: {against}); all outputs equal", flush=True)
        for job in jobs():
            print(measure(job, before[against], after[isa], runs), flush=True)


def main() -> None:
    """Parse the command line, build, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", required=True)
    parser.add_argument("--compiler", help="a second C++ compiler for this checkout")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        new, old = built(None, work / "new"), built(args.against, work / "old")
        table(f"{args.against} -> this checkout", library(old), library(new), args.runs)
        if args.compiler:
            second = built(None, work / "second", args.compiler)
            title = f"default compiler -> {args.compiler}"
            table(title, library(new), library(second), args.runs)


if __name__ == "__main__":
    main()
