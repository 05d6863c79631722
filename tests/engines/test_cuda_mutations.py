"""Known GPU bugs, seeded into the kernels one at a time: the checks must notice each."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from emulator import build
from emulator.kernels import kernels_of
from emulator.sanitize import exercise_apart
from helpers import nightly_but

from nf4cli.engines import nvrtc

pytestmark = pytest.mark.gpu

LARGE = ("quantize<2, 2, 1, false",)
SMALL = ("quantize<2, 2, 1, true",)  # blocks of 32
NESTED = ("nested_quantize",)
DEQUANTIZE = ("dequantize<2",)
FLOAT8 = ("quantize<3, 2, 1",)
INTEGERS = ("quantize<6, 2, 1",)  # of 4 bits, with zero points
SEARCH = ("search_scales<2, 1, false, true",)  # without importance
WEIGHTED = ("search_scales<2, 1, false, false",)  # with it
SMALL_SEARCH = ("search_scales<2, 1, true, true",)
EVERY = (
    *LARGE, *SMALL, "quantize<2, 2, 2", *NESTED, *DEQUANTIZE, *FLOAT8, *INTEGERS, *SEARCH,
    *WEIGHTED, *SMALL_SEARCH,
)  # fmt: skip
CHECKS = {
    "values": ("", None),
    "values in reversed order": ("", "reversed"),
    "asan": ("asan", None),
    "tsan": ("tsan", None),
}
"""Name -> (sanitizer, order of threads); values are compared in all."""


class Mutation(NamedTuple):
    """A bug.

    Attributes:
        kernels: parts of the names of those that are compiled with it, to show it.
        check: of CHECKS, the one that must notice it; the sanitizers where no other does.
        before, after: text of the source, which is there once, and what takes its place.
    """

    kernels: tuple[str, ...]
    check: str
    before: str
    after: str


MUTATIONS = {
    # -- races
    "no barrier behind the table": Mutation(
        LARGE, "tsan",
        "reinterpret_cast<const uint32_t*>(book)[i];\n  __syncthreads();",
        "reinterpret_cast<const uint32_t*>(book)[i];",
    ),
    "no barrier between warps that share a block": Mutation(
        LARGE, "values",
        "warps[warp] = value;\n    __syncthreads();", "warps[warp] = value;",
    ),
    "no barrier behind the heap": Mutation(
        NESTED, "tsan",
        "kNestedBits)];\n  __syncthreads();", "kNestedBits)];",
    ),
    "no barrier behind the decoding table": Mutation(
        DEQUANTIZE, "values",
        "= table->decode[threadIdx.x];\n  __syncthreads();", "= table->decode[threadIdx.x];",
    ),
    "a warp reads its tile before it is written": Mutation(
        DEQUANTIZE, "values",
        "[lane];\n  __syncwarp();", "[lane];",
    ),
    "error sums are read before they are written": Mutation(
        LARGE, "values",
        "    __syncwarp();\n    if (lane < 2)", "    if (lane < 2)",
    ),
    "error sums are overwritten while they are read": Mutation(
        LARGE, "values",
        "total = total + terms[i][lane];\n    __syncwarp();", "total = total + terms[i][lane];",
    ),
    # -- divergence
    "threads behind the end return before a shuffle": Mutation(
        LARGE, "values",
        "  const int lanes = 1 << log_lanes;", "  const int lanes = 1 << log_lanes;\n"
        "  if (!inside) return;",
    ),
    "half a warp is asked to shuffle": Mutation(
        LARGE, "values",
        "kAll = 0xffffffffu", "kAll = 0x0000ffffu",
    ),
    # -- bounds
    "a tail is one element too long": Mutation(
        LARGE, "values",
        "i < n ? Source<kFrom>::one", "i <= n ? Source<kFrom>::one",
    ),
    "a packed tail is one byte too long": Mutation(
        LARGE, "asan",
        "if (place + i < (n + 1) / 2)", "if (place + i < (n + 2) / 2 + (n == 1))",
    ),
    "half a segment is stored whole": Mutation(
        SMALL, "asan",
        "if (2 * place < n) *", "if (segment * kSegment < n) *",
    ),
    "half a segment is loaded whole": Mutation(
        SMALL, "asan",
        "const bool whole = !kSmall", "const bool whole = true",
    ),
    "a shared array is too small": Mutation(
        LARGE, "asan",
        "float warps[kThreads / kWarp]", "float warps[kThreads / kWarp - 1]",
    ),
    "error sums of a block that is not there": Mutation(
        SMALL, "values",
        "if (kSmall ? entry * kSegment / 2 >= n : !inside) continue;", "if (!inside) continue;",
    ),
    "a partial tile is taken for a whole one": Mutation(
        DEQUANTIZE, "asan",
        "if (first + kTile > n) {", "if (first + kTile > n + 2) {",
    ),
    # -- wrong work
    "a shuffle too few": Mutation(
        LARGE, "values",
        "step < lanes && step < kWarp", "step < lanes / 2 && step < kWarp",
    ),
    "nibbles swapped": Mutation(
        LARGE, "values",
        "4 * (1 - (k & 1))", "4 * (k & 1)",
    ),
    "a vector that is not aligned": Mutation(
        LARGE, "values",
        "static_cast<const uint16_t*>(src) + i)",
        "static_cast<const uint16_t*>(src) + i - (i > 0))",
    ),
    "error and value fused": Mutation(
        LARGE, "values",
        "const float error = y - entry.value;",
        "const float error = __fmaf_rn(x[row][k], units[b].inverse, -entry.value);",
    ),
    "error sums folded in another order": Mutation(
        LARGE, "values",
        "lanes[k] = lanes[k] + lanes[k + step];",
        "lanes[k] = lanes[2 * k] + lanes[2 * k + 1];",
    ),
    "the tail multiplies": Mutation(
        LARGE, "values",
        "value / unit.absmax", "value * (1.0f / unit.absmax)",
    ),
    "no floor under a tail's absmax": Mutation(
        LARGE, "values",
        "unit.absmax = nf4_floored(largest)", "unit.absmax = largest",
    ),
    "an error sum takes its neighbour's absmax": Mutation(
        LARGE, "values",
        "block = entry >> shift;", "block = entry >> (shift + 1);",
    ),
    "half a block is judged": Mutation(
        LARGE, "values",
        "if (shift > 5 && (base & kWarp) == 0) continue;", "",
    ),
    "outliers of a block are counted by each of its lanes": Mutation(
        LARGE, "values",
        "if (left > 0 && (lane & (lanes - 1)) == 0) {", "if (left > 0) {",
    ),
    "a tail is judged as a whole block": Mutation(
        LARGE, "values",
        "left >> log_block ? 1 << log_block : (int)left", "1 << log_block",
    ),
    "zeros beside an outlier count": Mutation(
        LARGE, "values",
        "lost ? 1 : kUnclear", "1",
    ),
    "a factor of the row above": Mutation(
        FLOAT8, "values",
        "(f.row + lines) / f.block_rows", "f.row / f.block_rows + lines / f.block_rows",
    ),
    "zero points are forgotten": Mutation(
        INTEGERS, "values", "kZero && f.zero ? f.zero[place] : 0.0f", "0.0f",
    ),
    "the nibbles of another thread": Mutation(
        INTEGERS, "values", "half ? raw.x : raw.y, 1", "half ? raw.y : raw.x, 1",
    ),
    "the place in a run is forgotten": Mutation(
        DEQUANTIZE, "values",
        "(uint32_t)(s.first + block)", "(uint32_t)(block)",
    ),
    "one level of the heap is missing": Mutation(
        NESTED, "values",
        "level < kNestedBits; level++", "level < kNestedBits - 1; level++",
    ),
    # -- the search for scales
    "the losses of segments are read before they are written": Mutation(
        SEARCH, "values",
        "board.sums[thread] = sum;\n  wait_for(lanes);", "board.sums[thread] = sum;",
    ),
    "the losses of segments are overwritten while they are read": Mutation(
        SEARCH, "tsan",
        "total = total + board.sums[first + i];\n  wait_for(lanes);",
        "total = total + board.sums[first + i];",
    ),
    "the ladder is copied behind the barrier": Mutation(
        SEARCH, "tsan",
        "  load_ladder(ladder, steps);\n  load_book(book, table);",
        "  load_book(book, table);\n  load_ladder(ladder, steps);",
    ),
    "a barrier is missing before a warp's number is written again": Mutation(
        SEARCH, "tsan",
        "value += board.counts[first + i];\n    __syncthreads();",
        "value += board.counts[first + i];",
    ),
    "a thread turns as often as its own block needs": Mutation(
        SEARCH, "values",
        "most_of(inside ? last - first + 1 : 0, lanes, board)", "inside ? last - first + 1 : 0",
    ),
    "a warp turns as often as its own blocks need": Mutation(
        SEARCH, "values",
        "for (int i = 0; i < kThreads / kWarp; i++)", "for (int i = 0; i < 0; i++)",
    ),
    "a partial segment is loaded whole": Mutation(
        SEARCH, "asan",
        "if ((segment + 1) * kSegment <= n)", "if (segment * kSegment < n)",
    ),
    "the codes of a partial segment are stored whole": Mutation(
        SEARCH, "asan",
        "half, (segment + 1) * kSegment <= n, packed)", "half, true, packed)",
    ),
    "an index of a block that is not there": Mutation(
        SMALL_SEARCH, "asan",
        "if (inside && (thread & (lanes - 1)) == 0) {", "if ((thread & (lanes - 1)) == 0) {",
    ),
    "a block that is not there is measured": Mutation(
        SMALL_SEARCH, "asan",
        "    if (first < n) absmax[", "    absmax[",
    ),
    "the weights do not begin anew with a row": Mutation(
        WEIGHTED, "asan",
        "column = column + 1 == importance.columns ? 0 : column + 1;", "column = column + 1;",
    ),
    "the place in the first row is forgotten": Mutation(
        WEIGHTED, "values",
        "importance.first + (uint32_t)first", "(uint32_t)first",
    ),
    "negative scales are never taken": Mutation(
        SEARCH, "values",
        "const bool negative = half ? smallest < other_loss : other_loss < smallest;",
        "const bool negative = false;",
    ),
    "of equal losses the last counts": Mutation(
        SEARCH, "values",
        "if (loss < smallest)", "if (loss <= smallest)",
    ),
    "the largest scale is left out": Mutation(
        SEARCH, "values",
        "magnitudes[last + 1] * unit <= most", "magnitudes[last + 2] * unit <= most",
    ),
    "a scale below the smallest is tried": Mutation(
        SEARCH, "values",
        "nf4_first_step(magnitudes, count, unit, least)",
        "nf4_first_step(magnitudes, count, unit, 0.9f * least)",
    ),
    "the unit of another run": Mutation(
        SMALL_SEARCH, "values",
        "unit[block >> ladder.log_run]", "unit[block >> (ladder.log_run + 1)]",
    ),
    "values beyond one look in a cell of others": Mutation(
        WEIGHTED, "values",
        "kBounded ? scaled : fminf(fmaxf(scaled, -1.0f), 1.0f)", "scaled",
    ),
    "the losses of segments are added in another order": Mutation(
        WEIGHTED, "values",
        "for (int i = thread & 1; i < lanes; i += 2)",
        "for (int i = lanes - 2 + (thread & 1); i >= 0; i -= 2)",
    ),
    "product and error of a candidate fused": Mutation(
        WEIGHTED, "values",
        "const float error = y - search<kSteps, false>(y, book).value;",
        "const float error = __fmaf_rn(x[row][k], inverses[sign], "
        "-search<kSteps, false>(y, book).value);",
    ),
    "zeros beside an outlier count under chosen scales": Mutation(
        SEARCH, "values",
        "between && nf4_outlier", "nf4_outlier",
    ),
    "squares in units of the scale are taken for those of the absmax": Mutation(
        SEARCH, "values",
        "nf4_units(sum * (ratio * ratio))", "nf4_units(sum)",
    ),
    "an error sum takes the unit of the run": Mutation(
        SEARCH, "values",
        "worst[entry] = error * chosen[b].absmax;", "worst[entry] = error * largest[b];",
    ),
}  # fmt: skip


def seeded(mutation: Mutation) -> dict[str, str]:
    """Return the kernels' sources with the bug."""
    texts = dict(nvrtc.sources())
    counts = {file: text.count(mutation.before) for file, text in texts.items()}
    assert sum(counts.values()) == 1, f"found in {counts}"
    file = max(counts, key=counts.__getitem__)
    return texts | {file: texts[file].replace(mutation.before, mutation.after)}


def noticed(mutation: Mutation, parts: tuple[str, ...], check: str) -> str:
    """Return what a check says of kernels with the bug, "" for nothing."""
    sanitizer, order = CHECKS[check]
    library = build.build_shim(kernels_of(parts), sanitizer, seeded(mutation))
    return exercise_apart(library, sanitizer, parts, order)


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_themselves_pass_every_check(check):
    sanitizer, order = CHECKS[check]
    library = build.build_shim(kernels_of(EVERY), sanitizer)
    assert exercise_apart(library, sanitizer, EVERY, order) == ""


EVERY_COMMIT = [*MUTATIONS][::3]
"""Some of each kind; scripts/nightly seeds all of them."""


@pytest.mark.parametrize("name", nightly_but(EVERY_COMMIT, MUTATIONS))
def test_a_mutation_is_caught(name):
    mutation = MUTATIONS[name]
    assert noticed(mutation, mutation.kernels, mutation.check), "not caught"


@pytest.mark.long
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught_among_all_kernels(name):
    mutation = MUTATIONS[name]
    assert noticed(mutation, EVERY, mutation.check), "not caught"


def test_each_check_is_needed_for_something():
    for names in (MUTATIONS, EVERY_COMMIT):
        assert {MUTATIONS[name].check for name in names} == {"values", "asan", "tsan"}
