"""How the CUDA engine deals with its devices: lanes, streams, memory, pieces."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from emulator import exercise
from emulator.device import WatchedStream

from nf4cli.engines import cuda, launches
from nf4cli.engines.cuda import ARENA, CudaEngine
from nf4cli.engines.protocol import GRANULE, ChosenScales, Codes, Importance, NestedAbsmax
from nf4cli.errors import MachineError, NonFiniteError
from nf4cli.format import codebook

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(new_device):
    return new_device()


def by(engine, src, dtype="BF16", blocksize=64, float8=None, buffer=None):
    n = float8.count(src) if float8 else src.nbytes // (4 if dtype == "F32" else 2)
    new = buffer or (lambda count: np.empty(count, np.uint8))
    packed, absmax = new((n + 1) // 2), np.empty(-(-n // blocksize), np.float32)
    stats = engine.quantize(src, dtype, blocksize, "nf4", packed, absmax, float8)
    return packed, absmax, stats


def searched(engine, src, dtype, blocksize, steps, importance=None, buffer=None):
    n = src.nbytes // (4 if dtype == "F32" else 2)
    new = buffer or (lambda count: np.empty(count, np.uint8))
    packed, index = new((n + 1) // 2), np.empty(-(-n // blocksize), np.uint8)
    unit = np.empty(-(-index.size // steps.run), np.float32)
    scales = ChosenScales(index, unit)
    stats = engine.search(src, dtype, blocksize, "nf4", steps, importance, packed, scales)
    return packed, index, unit, stats


def test_pieces_give_the_bytes_of_the_whole(device):
    """An arena that holds a few granules at a time, and buffers that are pinned or not."""
    engine = CudaEngine(devices=[device])
    engine._rooms[id(device)] = 1 << 20
    n = 9 * GRANULE + 777
    for dtype in ("BF16", "F32"):
        src = exercise.values(dtype, n, 4)
        expected = exercise.on_cpu(src, dtype, 64, "nf4")
        exercise.same("pageable", by(engine, src, dtype), expected)
        pinned = engine.buffer(src.nbytes)
        pinned[:] = src
        exercise.same("pinned", by(engine, pinned, dtype, buffer=engine.buffer), expected)
    assert sum(launch.kernel == "fold_errors" for launch in device.launched) > 8


@pytest.mark.parametrize("blocksize", [64, 512, 2048])
def test_a_search_in_pieces_gives_the_bytes_of_the_whole(device, blocksize):
    """Runs that lie within a granule, that the arena holds, and that are larger than the arena."""
    engine = CudaEngine(devices=[device])
    engine._rooms[id(device)] = 1 << 20
    columns = np.random.default_rng(1).exponential(size=1000).astype(np.float32)
    for dtype, double, weighted in (
        ("BF16", True, False),
        ("F32", True, True),
        ("F16", False, True),
    ):
        n = (9 if blocksize == 2048 and double and not weighted else 3) * GRANULE + 777
        src, steps = exercise.values(dtype, n, 4), codebook.ladder(double, weighted)
        importance = Importance(columns, 999) if weighted else None
        asked = (dtype, blocksize, steps, importance)
        expected = searched(exercise.CPU, src, *asked)
        exercise.same("pageable", searched(engine, src, *asked), expected)
        pinned = engine.buffer(src.nbytes)
        pinned[:] = src
        exercise.same("pinned", searched(engine, pinned, *asked, engine.buffer), expected)
    measured = sum(launch.kernel.startswith("measure") for launch in device.launched)
    chosen = sum(launch.kernel.startswith("search") for launch in device.launched)
    assert chosen > 6  # pieces of six searches
    assert (measured > chosen) == (blocksize == 2048)


@pytest.mark.parametrize("first", ["nan", "inf"])
@pytest.mark.parametrize("place", [0, GRANULE - 1, GRANULE, 2 * GRANULE + 5])
def test_the_first_value_that_is_not_finite_is_named_by_a_search(device, place, first):
    """An infinity makes the unit infinite of all that shares it, in granules before it as well."""
    engine = CudaEngine(devices=[device])
    for blocksize, room in ((64, cuda.ARENA), (512, cuda.ARENA), (2048, 1 << 20)):
        engine._rooms[id(device)] = room
        engine._lanes.clear()
        src = exercise.values("F32", 2 * GRANULE + 6, 1)
        src.view(np.float32)[[place, -1]] = float(first), float("inf")
        with pytest.raises(NonFiniteError) as caught:
            searched(engine, src, "F32", blocksize, codebook.ladder(True, False))
        assert caught.value.index == place


def test_weights_of_more_columns_than_fit_beside_a_granule_stay_with_the_cpu(device):
    engine = CudaEngine(devices=[device])
    src, steps = exercise.values("BF16", 6400, 1), codebook.ladder(True, True)
    for columns in (cuda._WIDEST_WEIGHTED, cuda._WIDEST_WEIGHTED + 1):
        importance = Importance(np.linspace(0, 9, columns, dtype=np.float32), columns - 100)
        found = searched(engine, src, "BF16", 64, steps, importance)
        exercise.same("wide", found, searched(exercise.CPU, src, "BF16", 64, steps, importance))
    assert sum(launch.kernel.startswith("search") for launch in device.launched) == 1


def test_float8_in_pieces_takes_the_right_factors(device):
    engine = CudaEngine(devices=[device])
    engine._rooms[id(device)] = 1 << 20
    shape, block = (2048, 1024), (128, 128)
    random = np.random.default_rng(1)
    src = random.integers(0, 127, shape[0] * shape[1], np.uint8)
    for first in (0, 64 * GRANULE // 1024 * 1024 // 8):
        scale = random.uniform(0, 0.1, 64 * 8).astype(np.float32)
        float8 = Codes(first, shape[1], scale, block)
        expected = exercise.on_cpu(src, "BF16", 64, "nf4", float8)
        exercise.same("float8", by(engine, src, float8=float8), expected)
    assert any(launch.kernel.startswith("quantize<3,") for launch in device.launched)


@pytest.mark.parametrize("kind", launches.CODE_SOURCES)
def test_codes_in_pieces_take_the_right_factors_and_zero_points(device, kind):
    engine = CudaEngine(devices=[device])
    engine._rooms[id(device)] = 1 << 20
    columns, block = 1024, (1, 16)
    random = np.random.default_rng(2)
    size = 1024 * 64
    scale = random.uniform(0, 0.1, size).astype(np.float32)
    zero = random.integers(-8, 8, size).astype(np.float32)
    for zeros in (None, zero) if kind.startswith(("offset", "int")) else (None,):
        codes = Codes(512, columns, scale, block, kind, zeros, "BF16")
        # No infinity, and no NaN, of either float8.
        src = random.integers(0, 124, (1024 * 1024 - 512) * codes.bits // 8, np.uint8)
        src = src[: src.size // 2048 * 2048]
        expected = exercise.on_cpu(src, "BF16", 64, "nf4", codes)
        exercise.same(kind, by(engine, src, float8=codes), expected)
    source = launches.CODE_SOURCES[kind]
    assert any(launch.kernel.startswith(f"quantize<{source},") for launch in device.launched)


def test_float8_that_the_kernels_do_not_take_stays_with_the_cpu(device):
    engine = CudaEngine(devices=[device])
    for columns, block, n in ((100, (10, 30), 6400), (64, (2, 12), 6400), (64, (1, 64), 6401)):
        rows = -(-n // columns)
        count = -(-rows // block[0]) * -(-columns // block[1])
        float8 = Codes(0, columns, np.full(count, 0.01, np.float32), block)
        src = np.random.default_rng(n).integers(0, 120, n, np.uint8)
        expected = exercise.on_cpu(src, "BF16", 64, "nf4", float8)
        exercise.same("float8", by(engine, src, float8=float8), expected)
    assert not device.launched


def test_nested_codes_of_any_place_and_length(device):
    engine = CudaEngine(devices=[device])
    engine._rooms[id(device)] = 1 << 20
    random = np.random.default_rng(3)
    for skip, run, n in ((0, 256, 5 * GRANULE + 64), (255, 256, 6400), (4000, 4096, 3 * GRANULE)):
        blocks = -(-n // 64)
        nested = NestedAbsmax(
            random.integers(0, 256, blocks + skip, np.uint8), skip, run, codebook.nested_map(),
            random.uniform(0, 2, -(-(blocks + skip) // run)).astype(np.float32), 0.25,
        )  # fmt: skip
        packed = random.integers(0, 256, (n + 1) // 2, np.uint8)
        found, expected = np.empty(2 * n, np.uint8), np.empty(2 * n, np.uint8)
        engine.dequantize(packed, n, 64, "nf4", nested, "BF16", found)
        exercise.CPU.dequantize(packed, n, 64, "nf4", nested, "BF16", expected)
        exercise.same("dequantize", (found,), (expected,))
    absmax = random.uniform(0, 1, 3 * GRANULE + 100).astype(np.float32)
    outputs = [(np.empty(absmax.size, np.uint8), np.empty(-(-absmax.size // 256), np.float32))
               for _ in range(2)]  # fmt: skip
    for who, (codes, units) in zip((engine, exercise.CPU), outputs, strict=True):
        who.nested_quantize(absmax, 0.5, codes, units)
    exercise.same("nested", *outputs)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("place", [0, GRANULE - 1, GRANULE, 2 * GRANULE + 5])
def test_the_first_value_that_is_not_finite_is_named(device, dtype, place):
    engine = CudaEngine(devices=[device])
    src = exercise.values(dtype, 2 * GRANULE + 6, 1)
    infinity = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    for later in (place, 2 * GRANULE + 5):
        src.view("u4" if dtype == "F32" else "u2")[later] = infinity
    with pytest.raises(NonFiniteError) as caught:
        by(engine, src, dtype)
    assert caught.value.index == place


def test_a_float8_byte_that_decodes_to_nan_is_named(device):
    engine = CudaEngine(devices=[device])
    src = np.zeros(2 * GRANULE, np.uint8)
    src[GRANULE + 9] = 0x7F
    float8 = Codes(0, 64, np.ones(2 * GRANULE // 64, np.float32), (1, 64))
    with pytest.raises(NonFiniteError) as caught:
        by(engine, src, float8=float8)
    assert caught.value.index == GRANULE + 9
    assert any(launch.kernel.startswith("quantize<3,") for launch in device.launched)


def test_two_threads_have_work_on_the_gpu_at_once(device, monkeypatch):
    """Each waits for its results only when the other has given the GPU its own work, too."""
    engine = CudaEngine(devices=[device])
    src = exercise.values("BF16", GRANULE, 1)
    by(engine, src)  # makes a lane, and loads kernels
    meeting = threading.Barrier(2)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            exercise.same("concurrent", by(engine, src), exercise.on_cpu(src, "BF16", 64, "nf4"))
        except BaseException as error:
            failed.append(error)

    lanes = [engine._new_lane(), engine._new_lane()]
    engine._lanes.extend(lanes)
    monkeypatch.setattr(WatchedStream, "waiting", lambda self: meeting.wait(timeout=30))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed  # BrokenBarrierError: one had waited for the other's end


def test_lanes_are_used_again_and_devices_take_turns(new_device):
    devices = [new_device(name=str(i)) for i in range(2)]
    engine = CudaEngine(devices=devices)
    src = exercise.values("BF16", 6400, 1)
    for _ in range(5):
        by(engine, src)
    assert [len(device.streams) for device in devices] == [1, 0]
    by(engine, src)
    with engine._lane(), engine._lane(), engine._lane():
        pass
    assert [len(device.streams) for device in devices] == [2, 1]
    assert engine.spare_threads == 2


def test_a_lane_that_failed_is_not_lent_again(device, monkeypatch):
    engine = CudaEngine(devices=[device])
    src = exercise.values("BF16", 6400, 1)
    expected = by(engine, src)

    def broken(self):
        raise MachineError("the GPU failed")

    with monkeypatch.context() as patch:
        patch.setattr(WatchedStream, "waiting", broken)
        with pytest.raises(MachineError, match="failed"):
            by(engine, src)
    assert not engine._lanes
    assert engine._made == 0
    exercise.same("after a failure", by(engine, src), expected)


def test_memory_runs_short_in_the_middle(new_device):
    """The second lane finds less than the first: it takes half, and half again."""
    device, told = new_device(memory=ARENA + (5 << 20)), []
    engine = CudaEngine(devices=[device], notify=told.append)
    src = exercise.values("F32", 30 * GRANULE, 1)
    expected = exercise.on_cpu(src, "F32", 64, "nf4")
    with engine._lane():
        exercise.same("in little memory", by(engine, src, "F32"), expected)
    assert [sentence.split("chunks of ")[1] for sentence in told] == ["4 MiB"]


def test_where_one_gpu_is_full_the_others_work(new_device):
    devices = [new_device(memory, str(memory)) for memory in (1000, 1 << 25)]
    engine = CudaEngine(devices=devices)
    engine.try_out()
    src = exercise.values("BF16", 6400, 1)
    for _ in range(3):
        exercise.same("on the other", by(engine, src), exercise.on_cpu(src, "BF16", 64, "nf4"))
    assert not devices[0].launched


def test_where_no_lane_is_left_a_thread_waits_for_one(new_device):
    engine = CudaEngine(devices=[new_device(ARENA + 1000)])
    src, results = exercise.values("BF16", 6400, 1), []
    with engine._lane():
        thread = threading.Thread(target=lambda: results.append(by(engine, src)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    exercise.same("after waiting", results[0], exercise.on_cpu(src, "BF16", 64, "nf4"))
    assert engine._made == 1


def test_gpus_take_turns(new_device):
    devices = [new_device(name=str(i)) for i in range(3)]
    engine = CudaEngine(devices=devices)
    engine.try_out()
    for device in devices:
        device.launched.clear()
    src = exercise.values("BF16", 6400, 1)
    for _ in range(6):
        by(engine, src)
    assert [len(device.launched) for device in devices] == [4, 4, 4]  # 2 calls of 2 launches


def test_the_smallest_arena_holds_every_kind_of_piece(device):
    engine = CudaEngine(devices=[device])
    engine._rooms[id(device)] = cuda._SMALLEST_ARENA
    n = 2 * GRANULE
    for blocksize in codebook.BLOCKSIZES:
        src = exercise.values("F32", n, 1)
        expected = exercise.on_cpu(src, "F32", blocksize, "nf4")
        exercise.same("F32", by(engine, src, "F32", blocksize), expected)
    importance = Importance(np.ones(cuda._WIDEST_WEIGHTED, np.float32), 0)
    for blocksize in (32, 4096):
        asked = (src, "F32", blocksize, codebook.ladder(True, True), importance)
        exercise.same("search", searched(engine, *asked), searched(exercise.CPU, *asked))
    columns = cuda._WIDEST
    scale = np.ones(n // 8, np.float32)
    float8 = Codes(columns // 2, columns, scale, (1, 8))
    src = np.full(n - columns, 0x33, np.uint8)
    expected = exercise.on_cpu(src, "F32", 32, "nf4", float8)
    exercise.same("float8", by(engine, src, "F32", 32, float8), expected)
    nested = NestedAbsmax(
        np.zeros(n // 32 + 4095, np.uint8), 4095, 4096, codebook.nested_map(),
        np.ones(-(-(n // 32 + 4095) // 4096), np.float32), 0.0,
    )  # fmt: skip
    out = np.empty(4 * n, np.uint8)
    engine.dequantize(np.zeros(n // 2, np.uint8), n, 32, "nf4", nested, "F32", out)
    engine.nested_quantize(
        np.ones(n, np.float32), 0.0, np.empty(n, np.uint8), np.empty(n // 256, np.float32)
    )


def test_pinned_memory_is_forgotten_with_its_buffer(device):
    engine = CudaEngine(devices=[device])
    buffer = engine.buffer(1000)
    assert engine.is_pinned(buffer[10:20])
    assert not engine.is_pinned(np.empty(10, np.uint8))
    del buffer
    assert not engine._pinned


def test_the_engine_names_its_devices(new_device, gpu_arch):
    devices = [new_device(name="X") for _ in range(2)]
    assert CudaEngine(devices=devices[:1]).name == f"cuda (X, sm_{gpu_arch})"
    assert CudaEngine(devices=devices).name == f"cuda (2 GPUs, X, sm_{gpu_arch})"
