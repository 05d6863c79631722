"""The NEON copy of the CPU engine, compiled and emulated, gives the reference's bytes."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from helpers import hard_values, raw

from nf4cli.engines import cpu
from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.protocol import DTYPE_CODES, GRANULE, ChosenScales, Codes
from nf4cli.format import codebook

ROOT = Path(__file__).parent.parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DTYPES = ("F32", "F16", "BF16")
SIZES = (1, 31, 33, 64, 97, 4_097)
QUANTIZE, DEQUANTIZE, NESTED, CODES, SEARCH = range(5)  # functions of neon_driver.cpp


@dataclass
class Calls:
    """What the driver is asked, and what the reference gave.

    Attributes:
        asked: the bytes of the driver's standard input.
        expected: (name, array) of each output, in turn.
    """

    asked: bytearray = field(default_factory=bytearray)
    expected: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def add(
        self, function: int, dtype: str, n: int, size: int, arrays: list, outputs: list
    ) -> None:
        """Add a call; size: its blocksize or columns."""
        self.asked += struct.pack("<4q", function, DTYPE_CODES[dtype], n, size)
        for array in arrays:
            data = bytes(array) if isinstance(array, ctypes.Structure) else array.tobytes()
            self.asked += struct.pack("<q", len(data)) + data
        name = f"function {function}, {dtype}, n {n}, {size}"
        self.expected += [(name, output) for output in outputs]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The compiled driver."""
    for tool in (COMPILER, EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool} (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    program = tmp_path_factory.mktemp("neon") / "driver"
    flags = "-std=c++17 -O2 -static -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror"
    subprocess.run(
        [COMPILER, *flags.split(), "-DNF4_ISA=neon", "-DNF4_VECTORS_NEON", f"-I{ROOT / 'cuda'}",
         ROOT / "tests/engines/neon_driver.cpp", "-o", program], check=True,
    )  # fmt: skip
    return program


def check(driver: Path, calls: Calls) -> None:
    """Run the driver; raise AssertionError where a byte differs."""
    done = subprocess.run(
        [EMULATOR, driver], input=bytes(calls.asked), capture_output=True, check=True
    )
    place = 0
    for name, expected in calls.expected:
        found = done.stdout[place : place + expected.nbytes]
        place += expected.nbytes
        assert found == expected.tobytes(), name
    assert place == len(done.stdout)


def quantize(calls: Calls, x, dtype: str, blocksize: int, quant_type: str) -> None:
    n = x.numel()
    packed, absmax = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // blocksize), np.float32)
    stats = CpuEngine("generic").quantize(raw(x), dtype, blocksize, quant_type, packed, absmax)
    book = cpu._c_codebook(quant_type)
    calls.add(QUANTIZE, dtype, n, blocksize, [book, raw(x)], [packed, absmax, stats])


@pytest.mark.parametrize("quant_type", codebook.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(driver, dtype, quant_type):
    calls = Calls()
    for blocksize in codebook.BLOCKSIZES:
        for n in SIZES:
            quantize(calls, hard_values(dtype, n, n + blocksize), dtype, blocksize, quant_type)
    quantize(calls, hard_values(dtype, GRANULE + 777, 1), dtype, 64, quant_type)
    check(driver, calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(driver, dtype):
    calls, random = Calls(), np.random.default_rng(1)
    for blocksize in codebook.BLOCKSIZES:
        for n in SIZES:
            packed = random.integers(0, 256, (n + 1) // 2, np.uint8)
            absmax = np.abs(raw(hard_values("F32", -(-n // blocksize), n)).view(np.float32))
            out = np.empty(n * (4 if dtype == "F32" else 2), np.uint8)
            CpuEngine("generic").dequantize(packed, n, blocksize, "nf4", absmax, dtype, out)
            book = cpu._c_codebook("nf4")
            calls.add(DEQUANTIZE, dtype, n, blocksize, [book, packed, absmax], [out])
    check(driver, calls)


def test_nested_quantize(driver):
    calls, random = Calls(), np.random.default_rng(2)
    for n in (1, 255, 256, 257, 5_000):
        absmax = np.abs(random.standard_normal(n) * 10.0 ** random.uniform(-9, 2, n))
        absmax = absmax.astype(np.float32)
        codes, nested = np.empty(n, np.uint8), np.empty(-(-n // 256), np.float32)
        offset = np.float32(absmax.mean())
        CpuEngine("generic").nested_quantize(absmax, float(offset), codes, nested)
        arrays = [codebook.nested_midpoints(), offset, absmax]
        calls.add(NESTED, "F32", n, 0, arrays, [codes, nested])
    check(driver, calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_codes(driver, dtype):
    calls, random = Calls(), np.random.default_rng(3)
    for columns in (32, 96, 1_024):
        n = 3 * columns
        source = random.integers(0, 256, n // 2, np.uint8)
        scale = random.uniform(0.1, 2, n // 32).astype(np.float32)
        out = np.empty(n * (4 if dtype == "F32" else 2), np.uint8)
        codes = Codes(0, columns, scale, (1, 32), "e2m1")
        CpuEngine("generic").decode_codes(source, codes, out, dtype)
        arrays = [codebook.code_values("e2m1"), scale, source]
        calls.add(CODES, dtype, n, columns, arrays, [out])
    check(driver, calls)


@pytest.mark.parametrize("quant_type", codebook.QUANT_TYPES)
def test_search(driver, quant_type):
    calls = Calls()
    for double in (True, False):
        ladder = codebook.ladder(double, False)
        for blocksize, n in ((32, 97), (64, 2_000), (256, 2_001)):
            x = hard_values("BF16", n, n)
            packed, index = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // blocksize), np.uint8)
            scales = ChosenScales(index, np.empty(-(-index.size // ladder.run), np.float32))
            stats = CpuEngine("generic").search(
                raw(x), "BF16", blocksize, quant_type, ladder, None, packed, scales
            )
            arrays = [cpu._c_codebook(quant_type), cpu._c_ladder(ladder), raw(x)]
            outputs = [packed, index, scales.unit, stats]
            calls.add(SEARCH, "BF16", n, blocksize, arrays, outputs)
    check(driver, calls)
