"""Known GPU bugs, seeded into the kernels one at a time: the checks must notice each."""

from __future__ import annotations

import pytest
from emulator import build
from emulator.sanitize import exercise_apart

from nf4cli.engines import launches, nvrtc

pytestmark = pytest.mark.gpu

PARTS = (
    "quantize<2, 2, 1",
    "quantize<2, 2, 2",
    "nested_quantize",
    "dequantize<2",
    "quantize<3, 2, 1",
)
KERNELS = tuple(
    k for k in launches.every_kernel() if k == "fold_errors" or any(part in k for part in PARTS)
)
CHECKS = (("", None), ("", "reversed"), ("asan", None), ("tsan", None))
"""(sanitizer, order of threads), in the order they are tried; values are compared in all."""

MUTATIONS = {
    # -- races
    "no barrier behind the table": (
        "reinterpret_cast<const uint32_t*>(book)[i];\n  __syncthreads();",
        "reinterpret_cast<const uint32_t*>(book)[i];",
    ),
    "no barrier between warps that share a block": (
        "warps[warp] = value;\n    __syncthreads();", "warps[warp] = value;"
    ),
    "no barrier behind the heap": ("kNestedBits)];\n  __syncthreads();", "kNestedBits)];"),
    "no barrier behind the decoding table": (
        "= table->decode[threadIdx.x];\n  __syncthreads();", "= table->decode[threadIdx.x];"
    ),
    "a warp reads its tile before it is written": ("[lane];\n  __syncwarp();", "[lane];"),
    "error sums are read before they are written": (
        "    __syncwarp();\n    if (lane < 2)", "    if (lane < 2)"
    ),
    "error sums are overwritten while they are read": (
        "total = total + terms[i][lane];\n    __syncwarp();", "total = total + terms[i][lane];"
    ),
    # -- divergence
    "threads behind the end return before a shuffle": (
        "  const int lanes = 1 << log_lanes;", "  const int lanes = 1 << log_lanes;\n"
        "  if (!inside) return;",
    ),
    "half a warp is asked to shuffle": ("kAll = 0xffffffffu", "kAll = 0x0000ffffu"),
    # -- bounds
    "a tail is one element too long": ("i < n ? Source<kFrom>::one", "i <= n ? Source<kFrom>::one"),
    "a packed tail is one byte too long": (
        "if (place + i < (n + 1) / 2)", "if (place + i < (n + 2) / 2 + (n == 1))"
    ),
    "half a segment is stored whole": (
        "if (2 * place < n) *", "if (segment * kSegment < n) *"
    ),
    "half a segment is loaded whole": ("const bool whole = !kSmall", "const bool whole = true"),
    "a shared array is too small": (
        "float warps[kThreads / kWarp]", "float warps[kThreads / kWarp - 1]"
    ),
    "error sums of a block that is not there": (
        "if (kSmall ? entry * kSegment / 2 >= n : !inside) continue;", "if (!inside) continue;"
    ),
    "a partial tile is taken for a whole one": (
        "if (first + kTile > n) {", "if (first + kTile > n + 2) {"
    ),
    # -- wrong work
    "a shuffle too few": ("step < lanes && step < kWarp", "step < lanes / 2 && step < kWarp"),
    "nibbles swapped": ("4 * (1 - (k & 1))", "4 * (k & 1)"),
    "a vector that is not aligned": (
        "static_cast<const uint16_t*>(src) + i)", "static_cast<const uint16_t*>(src) + i - (i > 0))"
    ),
    "error and value fused": (
        "const float error = y - entry.value;",
        "const float error = __fmaf_rn(x[row][k], units[b].inverse, -entry.value);",
    ),
    "error sums folded in another order": (
        "lanes[k] = lanes[k] + lanes[k + step];",
        "lanes[k] = lanes[2 * k] + lanes[2 * k + 1];",
    ),
    "the tail multiplies": ("value / unit.absmax", "value * (1.0f / unit.absmax)"),
    "no floor under a tail's absmax": (
        "unit.absmax = nf4_floored(largest)", "unit.absmax = largest"
    ),
    "an error sum takes its neighbour's absmax": (
        "block = entry >> shift;", "block = entry >> (shift + 1);"
    ),
    "half a block is judged": ("if (shift > 5 && (base & kWarp) == 0) continue;", ""),
    "outliers of a block are counted by each of its lanes": (
        "if (left > 0 && (lane & (lanes - 1)) == 0) {", "if (left > 0) {"
    ),
    "a tail is judged as a whole block": (
        "left >> log_block ? 1 << log_block : (int)left", "1 << log_block"
    ),
    "zeros beside an outlier count": ("lost ? 1 : kUnclear", "1"),
    "a factor of the row above": (
        "(f.row + lines) / f.block_rows", "f.row / f.block_rows + lines / f.block_rows"
    ),
    "the place in a run is forgotten": ("(uint32_t)(s.first + block)", "(uint32_t)(block)"),
    "one level of the heap is missing": (
        "level < kNestedBits; level++", "level < kNestedBits - 1; level++"
    ),
}  # fmt: skip


def seeded(name: str) -> dict[str, str]:
    texts = dict(nvrtc.sources())
    before, after = MUTATIONS[name]
    counts = {file: text.count(before) for file, text in texts.items() if before in text}
    assert list(counts.values()) == [1], f"{name}: found in {counts}"
    (file,) = counts
    return texts | {file: texts[file].replace(before, after)}


def caught_by(name: str) -> str:
    """Which check notices a mutation, "" for none."""
    texts = seeded(name)
    for sanitizer, order in CHECKS:
        library = build.build_shim(KERNELS, sanitizer, texts)
        found = exercise_apart(library, sanitizer, PARTS, order)
        if found:
            return f"{sanitizer or 'values'}{', ' + order if order else ''}: {found}"
    return ""


def test_the_kernels_themselves_pass_every_check():
    libraries = {}
    for sanitizer, order in CHECKS:
        if sanitizer not in libraries:
            libraries[sanitizer] = build.build_shim(KERNELS, sanitizer)
        assert exercise_apart(libraries[sanitizer], sanitizer, PARTS, order) == ""


def test_every_mutation_is_caught():
    found = build.parallel(*(lambda name=name: caught_by(name) for name in MUTATIONS))
    report = dict(zip(MUTATIONS, found, strict=True))
    print()
    for name, how in report.items():
        print(f"{name}: {how or 'NOT CAUGHT'}")
    assert [name for name, how in report.items() if not how] == []
    kinds = {how.split(":")[0].split(",")[0] for how in found}
    assert kinds == {"values", "asan", "tsan"}, "each check is needed for something"
