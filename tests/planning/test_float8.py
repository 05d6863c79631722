"""Float8 sources: decoded as torch casts, in the pass that quantizes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from float8_models import CASES, FP8, compressed, float8_model, spread
from helpers import (
    INPUT,
    LLAMA,
    carry_out,
    llama_tensors,
    nf4_ok,
    raw,
    read_all,
    refused,
    write_checkpoint_dir,
)

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.checkpoint.reader import ByteReader
from nf4cli.convert.conversion import Conversion
from nf4cli.engines.protocol import Codes
from nf4cli.errors import NonFiniteError
from nf4cli.format import codebook
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import make_resources

GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize("name", CASES)
def test_the_output_is_that_of_the_decoded_model(name, tmp_path):
    decoded = float8_model(tmp_path / "float8", *CASES[name])
    write_checkpoint_dir(tmp_path / "plain", decoded, LLAMA)
    for source in ("float8", "plain"):
        nf4_ok("quantize", tmp_path / source, tmp_path / f"{source}-nf4", "--keep", "o_proj")
    ours, plain = read_all(tmp_path / "float8-nf4"), read_all(tmp_path / "plain-nf4")
    assert ours.keys() == plain.keys()
    for key in plain:
        assert torch.equal(ours[key], plain[key]), key
    assert ours["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    configs = [json.loads((tmp_path / f"{s}-nf4" / "config.json").read_text())
               for s in ("float8", "plain")]  # fmt: skip
    for config in configs:
        config["quantization_config"]["llm_int8_skip_modules"].sort()
    assert configs[0] == configs[1]
    assert "is good" in nf4_ok("verify", tmp_path / "float8-nf4", "--source", tmp_path / "float8")


def test_a_file_stays_open_while_a_later_one_reads_scales_from_it(tmp_path, monkeypatch):
    """Its last bytes may be done with in that moment, by another thread."""
    float8_model(tmp_path / "float8", *CASES["deepseek"])
    plan = make_plan(open_checkpoint(tmp_path / "float8"), QuantConfig())
    first = plan.checkpoint.shards[0]
    scales = {
        tensor.start
        for t in plan.tensors
        if t.weight.encoding and t.weight.shard != first
        for shard, tensor in t.weight.encoding.companions
        if shard == first
    }
    read, done, slow = ByteReader.read, Conversion.item_done, []

    def read_slowly(self, offset, count):
        if self.path == first.path and offset in scales and not slow:
            slow.append(offset)
            time.sleep(0.4)
        return read(self, offset, count)

    def done_slowly(self, item):
        if item.job.plan.weight.stored == first.tensors[-1]:
            time.sleep(0.15)
        done(self, item)

    monkeypatch.setattr(ByteReader, "read", read_slowly)
    monkeypatch.setattr(Conversion, "item_done", done_slowly)
    engine = engines.load("cpu")
    carry_out(plan, tmp_path / "out", engine, make_resources(engine, 2, None, 2))
    assert slow
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", tmp_path / "float8")


def test_whole_blocks_decode_as_transformers_does():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    from nf4cli.engines.cpu import CpuEngine

    generator = torch.Generator().manual_seed(3)
    bits = (torch.randn(256, 384, generator=generator) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator) * 0.01
    theirs = Fp8Dequantize(None)._dequantize_one(bits, scale, torch.bfloat16)
    out = np.empty(2 * bits.numel(), np.uint8)
    float8 = Codes(0, 384, scale.reshape(-1).numpy(), (128, 128))
    CpuEngine().decode_codes(raw(bits.view(torch.uint8)), float8, out, "BF16")
    assert np.array_equal(out, raw(theirs))


def test_inspect_counts_float8_weights(tmp_path):
    float8_model(tmp_path / "float8", *CASES["deepseek"])
    seen = json.loads(nf4_ok("inspect", tmp_path / "float8", "--json"))
    assert seen["parameters"] > 100_000
    assert 8 < seen["bits_per_weight"] < 16


def test_every_byte_decodes_as_torch_casts_it():
    bits = torch.arange(256, dtype=torch.uint8)
    theirs = bits.view(torch.float8_e4m3fn).to(torch.float32).numpy()
    ours = codebook.float8_e4m3()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(7, 50, (3, 16)), (5, 64, (2, 64)), (4, 33, (4, 40)), (9, 17, (1, 17))],
)
def test_engines_decode_any_part_as_torch(engine, dtype, rows, columns, block):
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(rows)
    bits = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    bits[(bits & 127) == 127] = 1
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) * 0.3
    expected = (
        bits.view(torch.float8_e4m3fn).float() * spread(scale, (rows, columns), block)
    ).to(torch_dtype)  # fmt: skip
    flat = bits.reshape(-1).numpy()
    for first, last in ((0, rows * columns), (1, columns + 3), (columns * 2, rows * columns)):
        out = np.empty((last - first) * torch_dtype.itemsize, np.uint8)
        part = flat[first:last].copy()
        float8 = Codes(first, columns, scale.reshape(-1).numpy(), block)
        engine.decode_codes(part, float8, out, dtype)
        assert np.array_equal(out, raw(expected.reshape(-1)[first:last]))


@pytest.mark.parametrize(("byte", "scale"), [(0x7F, 1.0), (0xFF, 1.0), (1, float("nan")),
                                             (1, float("inf")), (0x7E, 3e38)])  # fmt: skip
def test_a_result_that_is_not_finite_is_found(engine, byte, scale):
    bits = np.zeros(100, np.uint8)
    bits[37] = byte
    if scale != 1.0:
        bits[:] = byte
    out = np.empty(200, np.uint8)
    float8 = Codes(0, 10, np.full(1, scale, np.float32), (10, 10))
    with pytest.raises(NonFiniteError) as caught:
        engine.decode_codes(bits, float8, out, "BF16")
    assert caught.value.index == (37 if scale == 1.0 else 0)


def broken(work: Path, change: object) -> None:
    """A float8 checkpoint in `work / "model"` whose tensors `change` has edited."""
    float8_model(work / "whole", *CASES["deepseek"])
    config = json.loads((work / "whole" / "config.json").read_text())
    tensors = read_all(work / "whole")
    change(tensors, config)
    write_checkpoint_dir(work / "model8", tensors, config)


def drop(t: dict, c: dict) -> None:
    del t[GATE + "_scale_inv"]


def reshape(t: dict, c: dict) -> None:
    t[GATE + "_scale_inv"] = torch.ones(5, 2)


def integers(t: dict, c: dict) -> None:
    t[GATE + "_scale_inv"] = t[GATE + "_scale_inv"].int()


def orphan(t: dict, c: dict) -> None:
    del t[GATE]


def unscaled(t: dict, c: dict) -> None:
    del c["quantization_config"]


def cube(t: dict, c: dict) -> None:
    t[GATE] = t[GATE].reshape(2, 64, 64)


def damaged(t: dict, c: dict) -> None:
    t[GATE].view(torch.uint8)[3, 5] = 0x7F


def nan_scale(t: dict, c: dict) -> None:
    t[GATE + "_scale_inv"][1, 1] = float("nan")


def integer_groups(t: dict, c: dict) -> None:
    c["quantization_config"] = compressed("channel", num_bits=4)


def no_groups(t: dict, c: dict) -> None:
    c["quantization_config"] = {"quant_method": "compressed-tensors"}


def grouped(t: dict, c: dict) -> None:
    c["quantization_config"] = compressed("group", group_size=128)


def zero_points(t: dict, c: dict) -> None:
    c["quantization_config"] = compressed("channel", symmetric=False)


def transformed(t: dict, c: dict) -> None:
    c["quantization_config"] = {**compressed("channel"), "transform_config": {"x": {}}}


def fnuz(t: dict, c: dict) -> None:
    c["quantization_config"] = {**FP8, "fmt": "e4m3fnuz"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, (GATE, "no " + GATE + "_scale_inv")),
        (reshape, (GATE + "_scale_inv", "[5, 2]", "[6, 2]")),
        (integers, (GATE + "_scale_inv", "I32", "F32")),
        (orphan, (GATE + "_scale_inv", "no float8 weight beside it")),
        (unscaled, ("F8_E4M3", "no quantization_config")),
        (cube, (GATE, "[2, 64, 64]")),
        (damaged, (GATE + "[3, 5]", "0x7f")),
        (nan_scale, (GATE + "[24, 40]", GATE + "_scale_inv")),
        (integer_groups, ("compressed-tensors", "4-bit float")),
        (no_groups, ("compressed-tensors", "config_groups")),
        (grouped, ("compressed-tensors", "'group'")),
        (fnuz, ("'fp8'", "'e4m3fnuz'")),
        (zero_points, ("compressed-tensors", "zero points")),
        (transformed, ("compressed-tensors", "transform_config")),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_does_not_fit_is_refused(work, change, says):
    broken(work, change)
    refused(INPUT, "quantize", "model8", "-q", says=says, cwd=work)


def test_what_does_not_decode_is_refused_whatever_is_asked(work):
    """Decoded, it would be another value than the source holds; as stored, no loader reads it."""
    broken(work, damaged)
    says = (GATE, "[3, 5]", "no option keeps it")
    refused(INPUT, "quantize", "model8", "--on-nonfinite", "keep", "-q", says=says, cwd=work)


def test_early_compressed_tensors_and_all_scales_of_kernels(tmp_path):
    quantization = compressed("channel")
    float8_model(tmp_path / "new", quantization, "_scale", (1, 0), "matrix", "bfloat16")
    tensors, config = read_all(tmp_path / "new"), {**LLAMA, "compression_config": quantization}
    tensors["model.layers.0.self_attn.k_proj.output_scale"] = torch.ones(1)
    write_checkpoint_dir(tmp_path / "old", tensors, config)
    for name in ("new", "old"):
        nf4_ok("quantize", tmp_path / name, tmp_path / f"{name}-nf4")
    new, old = read_all(tmp_path / "new-nf4"), read_all(tmp_path / "old-nf4")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in new)
    assert "compression_config" not in json.loads((tmp_path / "old-nf4/config.json").read_text())


@pytest.mark.parametrize(
    "name", ["q.qweight", "q.weight_packed", "mlp.experts.gate_up_proj_blocks"]
)
def test_packed_names_are_refused_without_a_config_too(work, name):
    tensors = {**llama_tensors(), f"model.layers.0.{name}": torch.ones(8, 8, dtype=torch.int32)}
    write_checkpoint_dir(work / "packed", tensors, LLAMA)
    refused(INPUT, "quantize", "packed", says=("already quantized", name), cwd=work)
