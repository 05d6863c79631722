"""Every engine gives the same bytes, and they are those of bitsandbytes' default implementation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import (
    TORCH_DTYPES,
    bnb_dequantize,
    bnb_nested,
    bnb_quantize,
    hard_values,
    raw,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4cli.engines.cpu import CpuEngine, available
from nf4cli.engines.protocol import GRANULE, Codes, NestedAbsmax
from nf4cli.errors import MachineError, NonFiniteError
from nf4cli.format.codebook import BLOCKSIZES, QUANT_TYPES, codebook, nested_map

DTYPES = list(TORCH_DTYPES)


def encode(engine, x: torch.Tensor, dtype: str, blocksize: int, quant_type: str):
    n = x.numel()
    packed = np.empty((n + 1) // 2, np.uint8)
    absmax = np.empty(-(-n // blocksize), np.float32)
    stats = engine.quantize(raw(x), dtype, blocksize, quant_type, packed, absmax)
    return packed, absmax, stats


def check_against_bitsandbytes(
    engine, x: torch.Tensor, dtype: str, blocksize: int, quant_type: str
):
    packed, absmax, _ = encode(engine, x, dtype, blocksize, quant_type)
    expected_packed, expected_absmax = bnb_quantize(x, blocksize, quant_type)
    np.testing.assert_array_equal(absmax.view(np.uint32), expected_absmax.view(np.uint32))
    np.testing.assert_array_equal(packed, expected_packed)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_equals_bitsandbytes(engine, blocksize, dtype, quant_type):
    for n in (1, 2, 31, 32, 33, 64, 65, 4095, 4096, 4097, 20_001):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(TORCH_DTYPES[dtype])
        check_against_bitsandbytes(engine, x, dtype, blocksize, quant_type)
    check_against_bitsandbytes(
        engine, hard_values(dtype, 50_003, blocksize), dtype, blocksize, quant_type
    )


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_on_and_around_every_midpoint(engine, quant_type):
    book = codebook(quant_type)
    points = np.concatenate([book.midpoints, book.values])
    around = np.concatenate([points, np.nextafter(points, 2, dtype=np.float32),
                             np.nextafter(points, -2, dtype=np.float32)])  # fmt: skip
    for scale in (1.0, 2.0**-120, 2.0**100, 0.3, 1e-38, 3e38):
        block = np.zeros(128, np.float32)
        block[: len(around)] = np.clip(around, -1, 1) * np.float32(scale)
        block[127] = scale
        check_against_bitsandbytes(engine, torch.from_numpy(block), "F32", 128, quant_type)
        check_against_bitsandbytes(engine, torch.from_numpy(block[:127]), "F32", 128, quant_type)


def test_every_16_bit_float_is_read_as_torch_reads_it(engine):
    for dtype in ("F16", "BF16"):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(TORCH_DTYPES[dtype])
        out = np.empty(4 * x.numel(), np.uint8)
        engine.cast(raw(x), dtype, out, "F32")
        expected = x.float().numpy()
        found = out.view(np.float32)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        ok = ~np.isnan(expected)
        np.testing.assert_array_equal(found.view(np.uint32)[ok], expected.view(np.uint32)[ok])


@pytest.mark.parametrize("to", ["F16", "BF16"])
@pytest.mark.parametrize("source", DTYPES)
def test_cast_rounds_as_torch(engine, source, to):
    x = hard_values(source, 300_000, 7)
    y = x.to(TORCH_DTYPES[to])
    x[torch.isinf(y)] = 0.0
    y = x.to(TORCH_DTYPES[to])
    out = np.empty(2 * x.numel(), np.uint8)
    engine.cast(raw(x), source, out, to)
    np.testing.assert_array_equal(out.view(np.uint16), raw(y).view(np.uint16))


def test_cast_names_the_first_value_that_overflows(engine):
    x = torch.tensor([1.0, float("inf"), 1e5, 1e6])
    with pytest.raises(NonFiniteError) as caught:
        engine.cast(raw(x), "F32", np.empty(8, np.uint8), "F16")
    assert caught.value.index == 2


def test_a_zero_block_stays_zero(engine):
    packed, absmax, stats = encode(engine, torch.zeros(128), "F32", 64, "nf4")
    assert set(packed.tolist()) == {0x77}
    assert absmax.tolist() == [0.0, 0.0]
    assert stats.tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_a_zero_tail_block_keeps_bitsandbytes_floor(engine):
    _, absmax, _ = encode(engine, torch.zeros(65), "F32", 64, "nf4")
    assert absmax.tolist() == [0.0, float(np.float32(1e-38))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 63, 64, 199, 200])
def test_nonfinite_is_refused_and_placed(engine, dtype, bad, place):
    x = torch.ones(201, dtype=TORCH_DTYPES[dtype])
    x[place] = bad
    x[200] = bad
    with pytest.raises(NonFiniteError) as caught:
        encode(engine, x, dtype, 64, "nf4")
    assert caught.value.index == place


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5000])
def test_double_quantization_equals_bitsandbytes(engine, size):
    generator = np.random.default_rng(size)
    for absmax in (
        generator.uniform(0, 1, size).astype(np.float32),
        (10.0 ** generator.uniform(-40, 38, size)).astype(np.float32),
        np.full(size, 0.25, np.float32),
        np.zeros(size, np.float32),
    ):
        offset = float(np.float32(engine.sum(absmax, 0.0) / size))
        codes, nested = np.empty(size, np.uint8), np.empty(-(-size // 256), np.float32)
        engine.nested_quantize(absmax, offset, codes, nested)
        expected_codes, expected_nested = bnb_nested(absmax, offset)
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(nested.view(np.uint32), expected_nested.view(np.uint32))


def test_double_quantization_on_and_around_its_midpoints(engine):
    values = nested_map()
    middle = (values[:-1] + values[1:]) / np.float32(2)
    for points in (middle, np.nextafter(middle, 2, dtype=np.float32),
                   np.nextafter(middle, -2, dtype=np.float32)):  # fmt: skip
        absmax = np.concatenate([points, np.ones(1, np.float32)])
        codes, nested = np.empty(256, np.uint8), np.empty(1, np.float32)
        engine.nested_quantize(absmax, 0.0, codes, nested)
        np.testing.assert_array_equal(codes, bnb_nested(absmax, 0.0)[0])


def test_nested_decoding_rounds_twice(engine):
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 256, 100_000).astype(np.uint8)
    nested = generator.uniform(0, 1, -(-codes.size // 256)).astype(np.float32)
    offset = float(np.float32(0.3337))
    out = engine.nested_dequantize(NestedAbsmax(codes, 0, 256, nested_map(), nested, offset))
    product = (nested_map()[codes] * nested.repeat(256)[: codes.size]).astype(np.float32)
    np.testing.assert_array_equal(out, product + np.float32(offset))
    fused = nested_map()[codes].astype(np.float64) * nested.repeat(256)[: codes.size] + offset
    assert (out != fused.astype(np.float32)).any()  # the sample does tell the two apart


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_equals_bitsandbytes(engine, blocksize, dtype, quant_type):
    generator = np.random.default_rng(blocksize)
    for n in (1, 63, 64, 96, 4097, 20_000):
        packed = generator.integers(0, 256, (n + 1) // 2).astype(np.uint8)
        absmax = generator.uniform(-1, 1, -(-n // blocksize)).astype(np.float32)
        out = np.empty(n * (4 if dtype == "F32" else 2), np.uint8)
        engine.dequantize(packed, n, blocksize, quant_type, absmax, dtype, out)
        expected = bnb_dequantize(packed, absmax, blocksize, quant_type, n, TORCH_DTYPES[dtype])
        np.testing.assert_array_equal(out, raw(expected))


def test_sum_goes_from_left_to_right(engine):
    values = np.random.default_rng(1).uniform(0, 1, 10_001).astype(np.float32)
    total = 0.5
    for value in values.tolist():
        total += value
    assert engine.sum(values, 0.5) == total
    assert engine.sum(values[5000:], engine.sum(values[:5000], 0.5)) == total


def test_error_sums_are_what_they_say(engine):
    x = torch.randn(3 * GRANULE + 777, generator=torch.Generator().manual_seed(5))
    packed, absmax, stats = encode(engine, x, "F32", 64, "nf4")
    decoded = bnb_dequantize(packed, absmax, 64, "nf4", x.numel(), torch.float32)
    error = (x - decoded).double()
    assert stats.shape == (4, 4)
    for granule, row in enumerate(stats):
        part = slice(granule * GRANULE, (granule + 1) * GRANULE)
        assert row[0] == pytest.approx(float((error[part] ** 2).sum()), rel=1e-5)
        assert row[1] == pytest.approx(float((x[part].double() ** 2).sum()), rel=1e-5)
        assert row[2] == pytest.approx(float(error[part].abs().max()), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_engines_agree_on_everything(all_engines, dtype, quant_type):
    for blocksize, n in ((32, GRANULE + 5), (64, 2 * GRANULE), (4096, 100_001)):
        x = hard_values(dtype, n, n)
        results = {
            name: encode(engine, x, dtype, blocksize, quant_type)
            for name, engine in all_engines.items()
        }
        packed, absmax, stats = results.pop("torch")
        for name, found in results.items():
            np.testing.assert_array_equal(found[0], packed, err_msg=name)
            np.testing.assert_array_equal(found[1], absmax, err_msg=name)
            np.testing.assert_array_equal(found[2], stats, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_give_the_bytes_of_the_whole(data):
    engine = CpuEngine()
    blocksize = data.draw(st.sampled_from(BLOCKSIZES))
    n = data.draw(st.integers(GRANULE + 1, 3 * GRANULE))
    x = hard_values("BF16", n, data.draw(st.integers(0, 2**32 - 1)))
    packed, absmax, stats = encode(engine, x, "BF16", blocksize, "nf4")
    cut = data.draw(st.integers(1, (n - 1) // GRANULE)) * GRANULE
    parts = [encode(engine, part, "BF16", blocksize, "nf4") for part in (x[:cut], x[cut:])]
    for i, whole in enumerate((packed, absmax, stats)):
        np.testing.assert_array_equal(np.concatenate([p[i] for p in parts]), whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=600), st.integers(0, 2**32 - 1))
def test_codes_survive_decoding_and_encoding(pairs, seed):
    """Encoding what codes decode to gives the codes back, where the block uses its full scale."""
    engine = CpuEngine()
    codes = np.array(pairs, np.uint8)
    n = 2 * len(codes)
    codes[::16] = codes[::16] | 0xF0  # code 15 decodes to +absmax: 32 elements a block
    absmax = np.random.default_rng(seed).uniform(1e-3, 1e3, -(-n // 32)).astype(np.float32)
    out = np.empty(4 * n, np.uint8)
    engine.dequantize(codes, n, 32, "nf4", absmax, "F32", out)
    packed, again, _ = encode(engine, torch.from_numpy(out.view(np.float32)), "F32", 32, "nf4")
    np.testing.assert_array_equal(again, absmax)
    np.testing.assert_array_equal(packed, codes)


@pytest.mark.parametrize("isa", available())
def test_flush_to_zero_in_the_calling_thread_changes_nothing(isa):
    engine = CpuEngine(isa)
    x = torch.tensor([3e38, -2e38, 1e38, 0.0] * 16)
    tiny = (torch.arange(64) * 2.0**-24).half()
    before = [encode(engine, x, "F32", 64, "nf4"), encode(engine, tiny, "F16", 64, "nf4")]
    assert torch.set_flush_denormal(True)
    try:
        after = [encode(engine, x, "F32", 64, "nf4"), encode(engine, tiny, "F16", 64, "nf4")]
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(before, after, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_gil_is_free_while_the_engine_works():
    x = torch.randn(1 << 24)
    engine = CpuEngine("generic")
    ticks = 0
    worker = threading.Thread(target=encode, args=(engine, x, "F32", 64, "nf4"))
    worker.start()
    while worker.is_alive():
        ticks += 1
    assert ticks > 1000


def test_an_instruction_set_that_is_not_there():
    with pytest.raises(MachineError, match="can run"):
        CpuEngine("avx1024")


def test_wrong_buffer_sizes_are_bugs_not_memory_errors():
    engine = CpuEngine()
    with pytest.raises(ValueError, match="packed bytes"):
        engine.quantize(np.zeros(256, np.uint8), "F32", 64, "nf4", np.empty(31, np.uint8),
                        np.empty(1, np.float32))  # fmt: skip


def test_the_tables_live_as_long_as_the_engine(monkeypatch):
    """C holds their addresses during a call: an array fetched for one call could die under it."""
    engine = CpuEngine()
    for name in ("nested_midpoints", "float8_e4m3"):
        monkeypatch.delattr(f"nf4cli.format.codebook.{name}")
    codes, nested = np.empty(300, np.uint8), np.empty(2, np.float32)
    engine.nested_quantize(np.linspace(0, 1, 300, dtype=np.float32), 0.5, codes, nested)
    out = np.empty(64, np.uint8)
    engine.decode_codes(codes[:32] & 63, Codes(0, 8, np.ones(4, np.float32), (4, 4)), out, "BF16")
