#!/usr/bin/env python
"""Count the instructions of the CPU codec's inner loops for each instruction set, without running.

    .venv/bin/python scripts/count_instructions.py --zig PATH [--mca llvm-mca]

Compiles what is done for a block of 64 bfloat16 weights (find its absmax, encode it with its error
sums; decode it) as a function of its own, with the compiler of the wheels, for AVX-512, AVX2 and
NEON.  Loops are unrolled to the end, so that the instructions can be counted.  llvm-mca's models of
processors estimate their cycles: nothing is measured on hardware.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = 64
SOURCE = r"""
#include "cpu_search.h"
namespace {
typedef Element<NF4_BF16>::Raw Raw;
}
extern "C" float measure(const Raw* x) { return nf4_float_of_bits(largest_of<NF4_BF16>(x, 64)); }
extern "C" void encode(const Search* search, const Raw* x, float inverse, float scale,
                       uint8_t* packed, Worst* worst, Squares* squares) {
  *squares = search->encode_rows<NF4_BF16, 1, true, 4>(x, inverse, scale, packed, *worst);
}
extern "C" void decode(const float* table, float absmax, const uint8_t* packed, Raw* out) {
  const Floats values = multiply(load_f32(table), spread(absmax));
  const Halves halves = round_bf16(values);
  for (int i = 0; i < 64; i += 2 * kRow) expand_halves(halves, packed + i / 2, out + i);
}
"""
COPIES = {
    "AVX-512": ("x86_64-linux-gnu", "-mcpu=x86_64_v4", "AVX512", ("skylake-avx512", "znver3")),
    "AVX2": ("x86_64-linux-gnu", "-mcpu=x86_64_v3", "AVX2", ("skylake", "znver3")),
    "NEON": ("aarch64-linux-gnu", "-mcpu=generic", "NEON", ("neoverse-n1", "apple-a13")),
}
"""Target, options and macro of each copy, and llvm-mca's names of processors to ask for."""


def assembly(zig: str, folder: Path, copy: str) -> dict[str, list[str]]:
    """Return the instructions of each function, as lines of assembly."""
    target, level, macro, _ = COPIES[copy]
    source, made = folder / "kernels.cpp", folder / "kernels.s"
    source.write_text(SOURCE)
    subprocess.run(
        [zig, "c++", "-target", target, level, f"-DNF4_VECTORS_{macro}", f"-I{ROOT / 'cuda'}",
         "-O3", "-mllvm", "-unroll-threshold=9999", "-fno-fast-math", "-ffp-contract=off",
         "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-sanitize=all",
         "-fno-asynchronous-unwind-tables", "-g0", "-S", "-o", str(made), str(source)],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    functions: dict[str, list[str]] = {}
    name = None
    for line in made.read_text().splitlines():
        if label := re.match(r"(\w+):", line):
            name = label[1] if label[1] in ("measure", "encode", "decode") else None
        elif line.startswith(".Lfunc_end"):
            name = None
        elif name and re.match(r"\s+[a-z]", line):
            functions.setdefault(name, []).append(line.strip())
    return functions


def cycles(mca: str, copy: str, processor: str, lines: list[str]) -> float | None:
    """Return llvm-mca's cycles of one run of a function among many, or None if it cannot say."""
    target, *_ = COPIES[copy]
    body = "\n".join(line for line in lines if not re.match(r"ret|vzeroupper", line))
    done = subprocess.run(
        [mca, f"-mtriple={target}", f"-mcpu={processor}", "-iterations=200"],
        input=body, check=False, capture_output=True, text=True,
    )  # fmt: skip
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(found[1]) / 200 if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zig", required=True, help="zig's program, of the wheel ziglang")
    parser.add_argument("--mca", default="llvm-mca")
    options = parser.parse_args()
    print(
        "| copy | step | instructions a weight | cycles a weight, by llvm-mca |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for copy in COPIES:
            functions = assembly(options.zig, Path(folder), copy)
            steps = {"encode": functions["measure"] + functions["encode"],
                     "decode": functions["decode"]}  # fmt: skip
            for step, lines in steps.items():
                looped = [line for line in lines if re.match(r"(j[a-z]+|b(\.\w+)?|cb\w+)\s", line)]
                assert not looped, f"{copy}, {step}: not a straight line: {looped}"
                asked = {p: cycles(options.mca, copy, p, lines) for p in COPIES[copy][3]}
                said = ", ".join(f"{p} {c / WEIGHTS:.2f}" for p, c in asked.items() if c)
                print(f"| {copy} | {step} | {len(lines) / WEIGHTS:.2f} | {said} |")


if __name__ == "__main__":
    main()
