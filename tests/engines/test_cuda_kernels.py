"""The GPU kernels on the CPU: NVIDIA's own PTX for every generation, and the .cu under g++."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from emulator import build, exercise, ptx
from emulator.kernels import SAMPLE_PARTS, sample_of_kernels
from emulator.real import DeviceKernels
from emulator.sanitize import exercise_apart
from helpers import nightly_but

from nf4cli.engines import launches
from nf4cli.format import codebook

pytestmark = pytest.mark.gpu

SAMPLE = sample_of_kernels()


@pytest.fixture(scope="module")
def text_of(real_gpu) -> Callable[[str], tuple[str, dict[str, str]]]:
    """Return NVRTC's PTX of the sample for a generation."""
    if real_gpu is not None:
        pytest.skip("looks at PTX, or runs it on the emulated GPU, and --real-gpu was given")
    return cache(lambda arch: build.compile_ptx(arch, SAMPLE))


def code_of(text: str) -> str:
    """PTX without what only names its target."""
    return re.sub(r"^\.(target|version).*|//.*", "", text, flags=re.M)


ORDERS = pytest.mark.parametrize(
    "order", ["7", *(pytest.param(o, marks=pytest.mark.long) for o in (None, "reversed"))]
)
"""Orders of a block's threads: a shuffled one on every commit."""


@ORDERS
def test_kernels_as_nvrtc_compiles_them(emulated_ptx, pytestconfig, monkeypatch, order):
    """A sample of them on every commit."""
    if order:
        monkeypatch.setenv("EMU_ORDER", order)
    if pytestconfig.getoption("--long"):
        assert exercise.exercise(emulated_ptx) > 1000
    else:
        assert exercise.exercise(emulated_ptx, parts=SAMPLE_PARTS) > 250


@ORDERS
def test_every_kernel_as_gcc_compiles_it(emulated_shim, monkeypatch, order):
    if order:
        monkeypatch.setenv("EMU_ORDER", order)
    assert exercise.exercise(emulated_shim) > 1000


def test_every_kernel_in_memory_of_its_exact_size(new_device, real_gpu):
    """All of the checks on a real GPU; on an emulated one, which looks at guards around each array,
    some."""
    if real_gpu is not None:
        assert exercise.exercise(DeviceKernels(real_gpu)) > 1000
    else:
        assert exercise.exercise(DeviceKernels(new_device()), quick=True, parts=SAMPLE_PARTS) > 90


@pytest.mark.long
def test_kernels_for_every_generation(text_of):
    """Generations whose code equals that of sm_80 ran above; the others run here."""
    ran = {code_of(text_of("80")[0])}
    others = []
    for arch in build.ARCHS:
        text, _ = text_of(arch)
        if code_of(text) not in ran:
            ran.add(code_of(text))
            others.append(arch)
    libraries = build.parallel(
        *(lambda arch=arch: build.build_ptx(*text_of(arch)) for arch in others)
    )
    for library in libraries:
        assert exercise.exercise(build.Kernels(library), quick=True, parts=SAMPLE_PARTS) > 90
    assert len(others) >= 2, "Turing and Blackwell used to have code of their own"


# Turing and Blackwell have code of their own.
@pytest.mark.parametrize("arch", nightly_but(("75", "100"), build.ARCHS))
def test_every_operation_rounds_on_its_own(text_of, arch):
    text, _ = text_of(arch)
    operations = ptx.instructions(text)
    names = {op for op, _ in operations}
    assert not {op for op in names if re.search(r"ftz|approx|\bsat\b|full", op)}
    for op in ("mul.f32", "add.f32", "sub.f32", "mul.f64", "add.f64", "div.full.f32"):
        assert op not in names  # without .rn, a later stage may fuse it
    assert {"mul.rn.f32", "add.rn.f32", "div.rn.f32", "mul.rn.f64", "add.rn.f64"} <= names
    # Only the search for a cell is fused, which decides no byte: 15.25 x + 2097167.25.
    for kernel in text.split(".entry")[1:]:
        moved = dict(re.findall(r"mov\.[bf]32\s+(%\w+), 0f([0-9A-F]{8});", kernel))
        fused = [arguments for op, arguments in ptx.instructions(kernel) if op.startswith("fma")]
        name = kernel.split("(")[0]
        # search_scales: for each of two candidates, and for the code
        assert len(fused) == (
            32 if "8quantizeI" in name else 3 * 32 if "search_scalesI" in name else 0
        )
        for arguments in fused:
            factors = {moved.get(a, a.removeprefix("0f")) for a in arguments[2:]}
            assert factors == {"41740000", "4A00003D"}, arguments


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_kernels_as_gcc_compiles_them_under_sanitizers(sanitizer, real_gpu):
    if real_gpu is not None:
        pytest.skip("compiles for the emulated GPU, and --real-gpu was given")
    library = build.build_shim(SAMPLE, sanitizer)
    assert exercise_apart(library, sanitizer, SAMPLE_PARTS) == ""


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_kernels_as_nvrtc_compiles_them_under_sanitizers(text_of, sanitizer):
    library = build.build_ptx(*text_of("90"), sanitizer)
    assert exercise_apart(library, sanitizer, SAMPLE_PARTS) == ""


def test_indices_are_64_bits_wide(emulated_ptx, emulated_shim):
    """A block far out of what 32 bits count, with its data put where the kernel looks for them."""
    block, n = (1 << 27) + 1, 8192  # elements a block of quantize and of dequantize
    first = block * n
    for kernels in (emulated_ptx, emulated_shim):
        src = exercise.values("BF16", n, 5)
        packed, absmax, _ = exercise.on_cpu(src, "BF16", 64, "nf4")
        book = launches.book("nf4").copy()
        codes, scales = np.empty_like(packed), np.empty_like(absmax)
        sums, worst = np.empty(2 * n // 64, np.float32), np.empty(n // 64, np.float32)

        def far(array: np.ndarray, bytes_an_element: float) -> int:
            return (exercise.address(array) - int(first * bytes_an_element)) % 2**64

        results = launches.Quantized(
            far(codes, 0.5), far(scales, 4 / 64), far(sums, 8 / 64), far(worst, 4 / 64), 0
        )
        launch, _ = launches.quantize(
            first + n, "BF16", 64, "nf4", exercise.address(book), far(src, 2), results
        )
        kernels.run(launch, first=block)
        exercise.same("quantize", (codes, scales), (packed, absmax))
        out, expected = np.empty(2 * n, np.uint8), np.empty(2 * n, np.uint8)
        place = launches.Scales(absmax=far(absmax, 4 / 64))
        (launch,) = launches.dequantize(
            first + n, "BF16", 64, exercise.address(book), far(packed, 0.5), place, far(out, 2)
        )
        kernels.run(launch, first=block)
        exercise.CPU.dequantize(packed, n, 64, "nf4", absmax, "BF16", expected)
        exercise.same("dequantize", (out,), (expected,))


def test_indices_of_a_search_are_64_bits_wide(emulated_ptx, emulated_shim):
    """As above; a run is one block, so that `unit` is `absmax`."""
    block, n = (1 << 27) + 1, 8192
    first = block * n
    steps = codebook.ladder(False, False)
    for kernels in (emulated_ptx, emulated_shim):
        src = exercise.values("BF16", n, 5)
        expected = exercise.searched_on_cpu(src, "BF16", 64, "nf4", steps, None)
        packed, index, absmax = (np.empty_like(array) for array in expected[:3])
        scale, outlier = np.empty_like(absmax), np.empty_like(index)
        sums, worst = np.empty(2 * n // 64, np.float32), np.empty(n // 64, np.float32)

        def far(array: np.ndarray, bytes_an_element: float) -> int:
            return (exercise.address(array) - int(first * bytes_an_element)) % 2**64

        largest = far(absmax, 4 / 64)
        results = launches.Searched(
            far(packed, 0.5), far(index, 1 / 64), largest, largest, far(scale, 4 / 64),
            far(outlier, 1 / 64), far(sums, 8 / 64), far(worst, 4 / 64), 0,
        )  # fmt: skip
        book, ladder = launches.book("nf4").copy(), launches.ladder(steps).copy()
        tables = launches.Tables(exercise.address(book), exercise.address(ladder), 1)
        measure, choose, _ = launches.search(
            first + n, "BF16", 64, "nf4", tables, far(src, 2), results, None
        )
        kernels.run(measure, first=block)
        kernels.run(choose, first=block)
        exercise.same("search", (packed, index, absmax), expected[:3])


def test_a_real_gpu_counts_to_more_than_32_bits(real_gpu):
    """4,294,967,296 weights and some: the last 8,192 of them are looked at."""
    if real_gpu is None:
        pytest.skip("needs 12 GB of a GPU's memory (--real-gpu); emulated above, at far addresses")
    n, last = (1 << 32) + 8192, 8192
    src = exercise.values("BF16", last, 5)
    packed, absmax, _ = exercise.on_cpu(src, "BF16", 64, "nf4")
    sizes = {"src": 2 * n, "packed": n // 2, "absmax": n // 16, "sums": n // 8, "worst": n // 16}
    memory = {name: real_gpu.allocate(size) for name, size in sizes.items()}
    at = {name: place.address for name, place in memory.items()}
    book = real_gpu.host_buffer(launches.book("nf4").nbytes)
    book[:] = launches.book("nf4")
    table, staged = real_gpu.allocate(book.nbytes), real_gpu.host_buffer(src.nbytes)
    staged[:] = src
    stream = real_gpu.stream()
    stream.upload(table.address, book)
    stream.upload(at["src"] + 2 * (n - last), staged)
    results = launches.Quantized(at["packed"], at["absmax"], at["sums"], at["worst"], stats=0)
    launch, _ = launches.quantize(n, "BF16", 64, "nf4", table.address, at["src"], results)
    stream.launch(launch.kernel, launch.blocks, launch.threads, launch.arguments)
    codes, scales = real_gpu.host_buffer(packed.nbytes), real_gpu.host_buffer(absmax.nbytes)
    stream.download(codes, at["packed"] + (n - last) // 2)
    stream.download(scales, at["absmax"] + 4 * (n - last) // 64)
    stream.synchronize()
    exercise.same("quantize", (codes, scales), (packed, absmax))
    (launch,) = launches.dequantize(
        n, "BF16", 64, table.address, at["packed"], launches.Scales(absmax=at["absmax"]), at["src"]
    )
    stream.launch(launch.kernel, launch.blocks, launch.threads, launch.arguments)
    stream.download(staged, at["src"] + 2 * (n - last))
    stream.synchronize()
    expected = np.empty(2 * last, np.uint8)
    exercise.CPU.dequantize(packed, last, 64, "nf4", absmax, "BF16", expected)
    exercise.same("dequantize", (staged,), (expected,))


@pytest.mark.parametrize("quant_type", codebook.QUANT_TYPES)
def test_the_search_finds_every_rank(quant_type):
    """The table of cells against plain counting, on every midpoint and its neighbours."""
    book = np.frombuffer(launches.book(quant_type).tobytes(), launches._BOOK)[0]
    points = codebook.codebook(quant_type).midpoints
    around = np.concatenate([points, np.nextafter(points, 2, dtype=np.float32),
                             np.nextafter(points, -2, dtype=np.float32),
                             np.linspace(-1, 1, 100_001, dtype=np.float32)])  # fmt: skip
    cell = ((around * np.float32(15.25) + np.float32(2097167.25)).astype(np.float32)
            .view(np.uint32) & 0x7C) // 4  # fmt: skip
    rank = (book["start"][cell] // 8).astype(int)
    middle = book["midpoints"]["value"]
    if launches.STEPS[quant_type] == 2:
        rank += 2 * (around > middle[rank + 1])
    rank += around > middle[rank]
    assert np.array_equal(rank, np.searchsorted(points, around, side="left"))


def test_a_ladder_whose_runs_a_shift_does_not_find_is_refused():
    steps = codebook.ladder(True, False)
    with pytest.raises(ValueError, match="a run of 3 blocks"):
        launches.ladder(codebook.Ladder(steps.steps, 3, steps.low, steps.high))


def test_float8_bytes_decode_as_the_table_has_them(kernels):
    """Each of the 254 finite values, alone in its block of zeros."""
    for dtype in ("F32", "BF16"):
        finite = np.flatnonzero((np.arange(256) & 127) != 127).astype(np.uint8)
        src = np.zeros((len(finite), 32), np.uint8)
        src[:, 5] = finite
        from nf4cli.engines.protocol import Codes

        float8 = Codes(0, 32, np.ones(len(finite), np.float32), (1, 32))
        _, absmax, _ = exercise.quantize(kernels, src.reshape(-1), dtype, 32, "nf4", float8)
        assert np.array_equal(absmax, np.abs(codebook.float8_e4m3()[finite]))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_not_a_number_reaches_the_error_sums(kernels, dtype):
    infinity = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    for bits in (infinity, infinity + 1, infinity | infinity >> 1):
        for place in (0, 63, 8191, 8200):
            src = exercise.values(dtype, 8201, 3)
            src.view("u4" if dtype == "F32" else "u2")[place] = bits
            _, _, stats = exercise.quantize(kernels, src, dtype, 64, "nf4")
            assert np.isnan(stats[0, 0]), (bits, place)
