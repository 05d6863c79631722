"""The machine code that NVIDIA's assembler makes for seven generations of GPUs, taken apart."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from emulator.build import ARCHS
from emulator.kernels import every_kernel
from helpers import nightly_but

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "roofline.py"


def load_script():
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


roofline = load_script()
BUDGET = {
    "quantize<2, 2, 1, false, false>": 24,  # bf16 to NF4
    "quantize<1, 1, 1, false, false>": 24,
    "quantize<0, 0, 1, false, false>": 24,
    "quantize<2, 2, 2, false, false>": 28,  # FP4: one comparison more
    "quantize<3, 2, 1, false, false>": 48,  # float8, decoded on the way
    "dequantize<2, true>": 18,
    "dequantize<1, true>": 25,
    "dequantize<0, true>": 14,
    "measure_blocks<2, false>": 12,
    "search_scales<2, 1, false, true>": 290,
    "search_scales<2, 1, false, false>": 1950,
    "fold_errors": 3,
    "nested_quantize<false>": 1,
}
"""Instructions a weight.  At its 2.75 bytes, an H100 is bound by its memory up to 27 of them."""


EVERY_COMMIT = ("80", "90")
"""Generations that are looked at on every commit: Ampere and Hopper."""
EVERY_KERNEL = "90, every kernel"
architectures = pytest.mark.parametrize("arch", nightly_but(EVERY_COMMIT, (*ARCHS, EVERY_KERNEL)))


@cache
def codes(arch: str):
    """The kernels of the table for a generation; for EVERY_KERNEL, all there are for Hopper."""
    if arch == EVERY_KERNEL:
        return roofline.machine_code("90", every_kernel())
    return roofline.machine_code(arch, tuple(kind.kernel for kind in roofline.KINDS))


@architectures
def test_nothing_is_spilled(arch):
    for kernel, code in codes(arch).items():
        assert (code.stack, code.local) == (0, 0), kernel
        assert code.count("LDL") == code.count("STL") == 0, kernel
        # three CTAs of 256 threads on 65,536 registers; two where all is done in registers
        assert code.registers <= (128 if kernel.startswith("search") else 80), kernel
        assert code.shared <= 8192, kernel


@architectures
def test_memory_is_accessed_16_bytes_at_a_time(arch):
    for kernel, code in codes(arch).items():
        tail = kernel.startswith(("quantize", "nested")) and kernel.endswith("true>")
        if not tail and kernel not in ("fold_errors", "widest_of_runs"):
            assert code.widest("LDG") == 16, kernel
            assert code.widest("STG") == (4 if kernel.startswith("measure") else 16), kernel


@architectures
def test_no_multiplication_is_fused_with_an_addition(arch):
    """FFMA only where the search looks for a cell, and in divisions, which are exact with it."""
    for kernel, code in codes(arch).items():
        # ("DFMA.FTZ" does not exist; FFMA.FTZ and .RM, .RP are parts of divisions)
        assert code.count("DFMA") == 0, kernel
        fused = [rest for _, op, rest in code.instructions if op == "FFMA"]
        if kernel.startswith(("dequantize", "fold", "measure", "widest")):
            assert not fused, kernel
            continue
        searches = kernel.startswith("search_scales")
        tail = kernel.endswith("true>") and not searches
        # search_scales: those of each turn, of the chosen scale and of its ratio, for two blocks,
        # some of them in copies for warps that have come apart; its cells are there twice
        divisions = (
            (16 if kernel.startswith("nested") else 32) + 2 if tail else 8 if searches else 2
        )
        cells = 0 if kernel.startswith("nested") else 32
        if searches:
            cells = sum("15.25" in rest or "2097167.25" in rest for rest in fused)
            assert cells >= 3 * 32, kernel
        assert len(fused) <= cells + 7 * divisions, kernel
        assert code.count("MUFU.RCP") <= 3 * divisions + 12, kernel


@pytest.mark.parametrize("arch", nightly_but(EVERY_COMMIT, (*EVERY_COMMIT, "100")))
def test_instructions_a_weight(arch):
    for kind in roofline.KINDS:
        count = codes(arch)[kind.kernel].longest_path(kind.trips) / kind.weights
        assert count <= BUDGET[kind.kernel], kind.title
        # a path that leaves the work out would be shorter than what each weight needs
        assert count > BUDGET[kind.kernel] / 2, kind.title


def test_an_h100_is_bound_by_memory(tmp_path):
    """The script itself; the table of docs/measurements.md is what it prints."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", tmp_path / "table.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "not measured" in done.stdout.splitlines()[0]
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table) == len(roofline.KINDS) * len(roofline.GPUS)
    bounds = {(row["kernel"], row["arch"]): row["bound"] for row in table}
    for arch in ("80", "90"):
        assert bounds["quantize bf16 to NF4", arch] == "memory"
        assert bounds["dequantize to bf16, nested", arch] == "memory"
    documented = (SCRIPT.parent.parent / "docs" / "measurements.md").read_text()
    for line in done.stdout.splitlines():
        assert line in documented, line
