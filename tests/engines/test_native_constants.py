"""What Python and native code both hold is the same: a compiler compares constants and layouts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np

from nf4cli.engines import cpu, launches, nvrtc, torch
from nf4cli.engines.protocol import CAST_CODES, DTYPE_CODES, GRANULE, OUTLIERS, ROW, SEGMENT, STATS
from nf4cli.format import codebook

ROOT = Path(__file__).parent.parent.parent
CONSTANTS = {
    "kGranule": GRANULE,
    "kSegment": SEGMENT,
    "kRow": ROW,
    "kStats": STATS,
    "kOutliers": OUTLIERS,
    "kAbsmaxFloor": f"{codebook.ABSMAX_FLOOR!r}f",
    "kMaxBlock": max(codebook.BLOCKSIZES),
    "kMaxSteps": codebook.MAX_STEPS,
    "kNestedRun": codebook.NESTED_BLOCKSIZE,
    "1 << kNestedBits": len(codebook.nested_map()),
    "kOutlierUnit": torch._OUTLIER_UNIT,
    "kOutlierShare": torch._OUTLIER_SHARE,
    "kOutlierMost": torch._OUTLIER_MOST,
    **{f"NF4_{name}": code for name, code in DTYPE_CODES.items()},
    **{f"NF4_{kind.upper()}": number for kind, number in launches.CODE_SOURCES.items()},
    "NF4_F64": CAST_CODES["F64"],
    "kThreads": launches._THREADS,
    "kWarp": launches._WARP,
    "kOwn": launches._OWN,
    "kRunLanes": launches._RUN_LANES,
    "kTile": launches._TILE,
    "kCells": launches._CELLS,
    "kGrid": f"{launches._GRID!r}f",
    "sizeof(Entry)": 8,  # what a rank of the search is a multiple of, see `launches.book`
    "sizeof(Midpoint)": 8,
}
"""C++ expression -> its value in Python."""


def layout(name: str, dtype: np.dtype) -> dict[str, int]:
    """Return the size of a struct and where its fields lie, as expressions."""
    fields = {f"offsetof({name}, {field})": place for field, (_, place) in dtype.fields.items()}
    return {f"sizeof({name})": dtype.itemsize, **fields}


LAYOUTS = {
    **layout("nf4_codebook", np.dtype(cpu._Codebook)),
    **layout("nf4_ladder", np.dtype(cpu._Ladder)),
    **layout("Book", launches._BOOK),
    **layout("Codes", launches._CODES),
    **layout("Scales", launches._SCALES),
    **layout("Ladder", launches._LADDER),
    **layout("Importance", launches._IMPORTANCE),
}


def compile_assertions(directory: Path, expected: dict[str, object]) -> str:
    """Return what g++ says of the installed kernels with these assertions; "" when all hold."""
    for name, text in nvrtc.sources().items():
        (directory / name).write_text(text)
    asserts = "".join(f"static_assert(({c}) == {value});\n" for c, value in expected.items())
    (directory / "check.cpp").write_text(
        f'#include "shim.h"\n#include <cstddef>\n#undef __global__\n#define __global__\n'
        f'#include "{nvrtc.SOURCES[0]}"\n{asserts}'
    )
    include = f"-I{ROOT / 'tests' / 'emulator'}"
    done = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", "-w", include, "check.cpp"],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (not done.stderr)
    return done.stderr


def test_python_and_native_code_hold_the_same_constants(tmp_path):
    assert compile_assertions(tmp_path, CONSTANTS) == ""


def test_python_and_native_code_lay_structs_out_alike(tmp_path):
    assert compile_assertions(tmp_path, LAYOUTS) == ""


def test_a_constant_that_differs_is_noticed(tmp_path):
    said = compile_assertions(tmp_path, {**CONSTANTS, "kGranule": 2 * GRANULE, "kWarp": 16})
    assert re.findall(r"static assertion failed\n.*?\((k\w+)\) ==", said, re.S) == [
        "kGranule", "kWarp"
    ]  # fmt: skip


def test_native_code_says_each_constant_once():
    texts = {path.name: path.read_text() for path in (ROOT / "cuda").iterdir()}
    for text in ("1e-38f;", "0x7f800000u;", "4096;", "= 65536;", "= 64;", "= 655;"):
        places = [name for name, source in texts.items() for _ in range(source.count(text))]
        granule_and_unit = text == "= 65536;"
        assert places == ["codec.h"] * (2 if granule_and_unit else 1), text
    for name, source in texts.items():
        bare = re.sub(r"//[^\n]*", "", source)
        if name != "codec.h":
            assert not re.search(r"1e-38|65536|\b4096\b|0x7f800000|\b655\b", bare), name
