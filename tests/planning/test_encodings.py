"""Sources whose weights are stored as codes: each output is that of the decoded checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_models import (
    GPT_OSS,
    compressed,
    compressed_model,
    gpt_oss,
    gptq_or_awq,
    library,
    nvfp4_of_modelopt,
    weights,
)
from float8_models import spread
from helpers import (
    INPUT,
    LLAMA,
    carry_out,
    llama_tensors,
    nf4_ok,
    raw,
    read_all,
    refused,
    same_files,
    write_checkpoint_dir,
)

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.checkpoint.types import Origin
from nf4cli.convert import conversion
from nf4cli.engines.protocol import GRANULE, Codes
from nf4cli.errors import InputError
from nf4cli.format import codebook
from nf4cli.format.config import QuantConfig
from nf4cli.format.dtypes import CODE_BITS
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import Resources

INT4_32 = weights(4, "int", "group", group_size=32)
SCHEMES = {
    "int4 group": [INT4_32],
    "int4 group, zero points": [weights(4, "int", "group", group_size=16, symmetric=False)],
    "int4 channel": [weights(4, "int", "channel")],
    "int4 channel, zero points": [weights(4, "int", "channel", symmetric=False)],
    "int8 group": [weights(8, "int", "group", group_size=32)],
    "int8 channel": [weights(8, "int", "channel")],
    "int8 channel, zero points": [weights(8, "int", "channel", symmetric=False)],
    "int8 group, zero points": [weights(8, "int", "group", group_size=32, symmetric=False)],
    "int4 and int8 whose headers look alike": [
        INT4_32, weights(8, "int", "group", group_size=16),
    ],
    "nvfp4": [weights(4, "float", "tensor_group", group_size=16)],
    "mxfp4": [weights(4, "float", "group", group_size=32)],
    "mixed": [INT4_32, weights(4, "float", "tensor_group", group_size=16),
              weights(8, "int", "channel")],
}  # fmt: skip


def same_output(
    work: Path, decoded: dict[str, torch.Tensor], config: dict, source: str = "source"
) -> None:
    """The output of `source` is that of the decoded checkpoint, and is proved from the source."""
    write_checkpoint_dir(work / "plain", decoded, config)
    for name in (source, "plain"):
        nf4_ok("quantize", work / name, work / f"{name}-nf4", "--keep", "o_proj")
    ours, plain = read_all(work / f"{source}-nf4"), read_all(work / "plain-nf4")
    assert ours.keys() == plain.keys()
    for key in plain:
        assert torch.equal(ours[key], plain[key]), key
    configs = [
        json.loads((work / f"{n}-nf4" / "config.json").read_text()) for n in (source, "plain")
    ]
    for made in configs:
        made["quantization_config"]["llm_int8_skip_modules"].sort()
    assert configs[0] == configs[1]
    assert "is good" in nf4_ok("verify", work / f"{source}-nf4", "--source", work / source)


def test_mxfp4_experts_decode_as_transformers_does(tmp_path):
    same_output(tmp_path, gpt_oss(tmp_path / "source"), GPT_OSS)
    shapes = {k: tuple(v.shape) for k, v in read_all(tmp_path / "source-nf4").items()}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (3, 64, 192)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (3, 96, 64)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_decode_as_the_library_does(name, tmp_path):
    same_output(tmp_path, compressed_model(tmp_path / "source", SCHEMES[name]), LLAMA)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_that_is_not_packed(tmp_path, symmetric):
    """The format "int-quantized": int8 as it is, and zero points as bytes."""
    scheme = weights(8, "int", "channel", symmetric=symmetric)
    compressor, parsed = library(scheme, "int-quantized")
    generator = torch.Generator().manual_seed(23)
    stored, decoded = {}, {}
    for name, value in llama_tensors().items():
        stored[name] = decoded[name] = value
        if "layers" not in name or value.dim() != 2:
            continue
        rows = value.shape[0]
        state = {
            "weight": torch.randint(-128, 128, value.shape, generator=generator).to(torch.int8),
            "weight_scale": (torch.rand(rows, 1, generator=generator) * 0.01).bfloat16(),
        }
        if not symmetric:
            zeros = torch.randint(-128, 128, (rows, 1), generator=generator)
            state["weight_zero_point"] = zeros.to(torch.int8)
        stored |= {name.removesuffix("weight") + key: part for key, part in state.items()}
        decoded[name] = compressor.decompress(dict(state), parsed)["weight"]
    config = {**LLAMA, "quantization_config": compressed(group_0=scheme)}
    write_checkpoint_dir(tmp_path / "source", stored, config)
    same_output(tmp_path, decoded, LLAMA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype_than_the_models(dtype, tmp_path):
    """The library computes in the dtype of the scales, and its result is rounded once more."""
    same_output(tmp_path, compressed_model(tmp_path / "source", [INT4_32], dtype), LLAMA)


def test_modelopt_nvfp4_and_float8_in_one_checkpoint(tmp_path):
    decoded = nvfp4_of_modelopt(tmp_path / "source")
    same_output(tmp_path, decoded, LLAMA)
    config = json.loads((tmp_path / "source/config.json").read_text())
    del config["quantization_config"]  # as older releases, which have hf_quant_config.json
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    nf4_ok("quantize", tmp_path / "source", tmp_path / "again")
    nf4_ok("quantize", tmp_path / "plain", tmp_path / "plain-again")
    ours, plain = read_all(tmp_path / "again"), read_all(tmp_path / "plain-again")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_experts_in_many_pieces_have_the_same_bytes(tmp_path, name):
    """Pieces begin and end within rows, groups and experts."""
    decoded = gpt_oss(tmp_path / "source", hidden=160, middle=224)
    plan = make_plan(open_checkpoint(tmp_path / "source"), QuantConfig())
    engine = engines.load(name)
    carry_out(plan, tmp_path / "out", engine, Resources(2, 8 * GRANULE, 0))
    made = read_all(tmp_path / "out")
    for layer in range(2):
        for leaf in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{layer}.mlp.experts.{leaf}"
            assert decoded[key].numel() > GRANULE
            assert torch.equal(made[key].view(torch.int16), decoded[key].view(torch.int16)), key


@pytest.mark.parametrize("kind", CODE_BITS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("through", [None, "BF16", "F16"])
def test_engines_decode_any_part_of_codes(engine, kind, dtype, through):
    """As torch computes it; with and without zero points, by rows, columns and blocks."""
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    generator = torch.Generator().manual_seed(len(kind))
    table = torch.from_numpy(codebook.code_values(kind))
    good = torch.isfinite(table).nonzero().reshape(-1)
    for (rows, columns), block in (((6, 96), (1, 32)), ((5, 50), (2, 50)), ((4, 40), (4, 1)),
                                   ((3, 9000), (1, 16))):  # fmt: skip
        picked = torch.randint(0, len(good), (rows, columns), generator=generator)
        codes = good[picked].to(torch.uint8)
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        scale = torch.rand(grid, generator=generator) * 0.01
        zero = torch.randint(-7, 8, grid, generator=generator).float()
        for zeros in (None, zero) if kind in ("int8", "offset4", "offset8", "uint8") else (None,):
            values = table[codes.long()]
            if zeros is not None:
                values = values - spread(zeros, (rows, columns), block)
            expected = values * spread(scale, (rows, columns), block)
            expected = expected.to(names[through or "F32"]).to(names[dtype]).reshape(-1)
            flat = codes.reshape(-1).numpy()
            for first, last in ((0, rows * columns), (columns - 6, 2 * columns + 4)):
                part = flat[first:last].copy()
                if len(table) == 16:
                    part = part[::2] | part[1::2] << 4
                found = Codes(
                    first, columns, scale.reshape(-1).numpy(), block, kind,
                    None if zeros is None else zeros.reshape(-1).numpy(), through,
                )  # fmt: skip
                out = np.empty((last - first) * names[dtype].itemsize, np.uint8)
                engine.decode_codes(part, found, out, dtype)
                assert np.array_equal(out, raw(expected[first:last]))


def test_the_values_of_codes_are_those_of_torch():
    bits = torch.arange(256, dtype=torch.uint8)
    for kind, dtype in (("e5m2", torch.float8_e5m2), ("int8", torch.int8)):
        theirs = bits.view(dtype).float().numpy()
        ours = codebook.code_values(kind)
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)), kind


def broken(
    work: Path, make: Callable[[Path], object], change: Callable[[dict, dict], None]
) -> None:
    """A checkpoint in work/"model" that `make` writes, and `change` has edited."""
    make(work / "whole")
    config = json.loads((work / "whole" / "config.json").read_text())
    tensors = read_all(work / "whole")
    change(tensors, config)
    write_checkpoint_dir(work / "model", tensors, config)


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
UP = "model.layers.1.mlp.up_proj.weight"
ASYMMETRIC = weights(4, "int", "channel", symmetric=False)


def int4(root: Path) -> object:
    return compressed_model(root, [INT4_32])


def zeros(root: Path) -> object:
    return compressed_model(root, [ASYMMETRIC])


def nvfp4(root: Path) -> object:
    return compressed_model(root, SCHEMES["nvfp4"])


def drop(name: str) -> Callable[[dict, dict], None]:
    return lambda t, c: t.pop(name)


def cut(name: str) -> Callable[[dict, dict], None]:
    return lambda t, c: t.update({name: t[name][:-1].clone()})


def put(name: str, place: tuple[int, ...], value: float) -> Callable[[dict, dict], None]:
    def change(tensors: dict, config: dict) -> None:
        tensors[name][place] = value

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[dict, dict], None]:
    return lambda t, c: t.update({name: t[name].to(dtype)})


def bytes_of_zeros(t: dict, c: dict) -> None:
    t[UP + "_zero_point"] = torch.zeros(128, 1, dtype=torch.int8)
    t[UP + "_zero_point"][70] = 9


def scheme(**more: object) -> Callable[[dict, dict], None]:
    return lambda t, c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(more)


def ordered(t: dict, c: dict) -> None:
    t[UP + "_g_idx"] = torch.zeros(64, dtype=torch.int32)


def smoothed(t: dict, c: dict) -> None:
    t["model.layers.0.mlp.down_proj.pre_quant_scale"] = torch.ones(128)


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (gpt_oss, drop(GATE_UP + "_scales"), (GATE_UP + "_blocks", "no " + GATE_UP + "_scales")),
        (gpt_oss, drop(GATE_UP + "_blocks"), (GATE_UP + "_scales", "incomplete")),
        (gpt_oss, cut(GATE_UP + "_scales"), (GATE_UP + "_scales", "[2, 192, 2]", "[3, 192, 2]")),
        (gpt_oss, cast(GATE_UP + "_scales", torch.int32), ("is I32", "expected U8")),
        (gpt_oss, cast(GATE_UP + "_blocks", torch.int8), ("is I8", "MXFP4")),
        (gpt_oss, put(GATE_UP + "_scales", (2, 7, 1), 255),
         (GATE_UP + "[2, 32, 7]", GATE_UP + "_scales[2, 7, 1]", "BF16", "as it is stored")),
        (int4, drop(UP + "_scale"), (UP + "_packed", "no " + UP + "_scale")),
        (int4, drop(UP + "_packed"), (UP + "_s", "incomplete")),
        (int4, drop(UP + "_shape"), (UP + "_packed", "no " + UP + "_shape")),
        (int4, cut(UP + "_scale"), (UP + "_packed", "[127, 2]", "fits none")),
        (int4, put(UP + "_shape", (1,), 63), (UP + "_shape", "[128, 63]", "[128, 64]")),
        (int4, put(UP + "_scale", (5, 1), float("nan")), (UP + "[5, 32]", UP + "_scale[5, 1]")),
        (int4, cast(UP + "_scale", torch.int32), (UP + "_scale", "is I32", "F32, F16, BF16")),
        (int4, cast(UP + "_packed", torch.int64), (UP + "_packed", "is I64", "I32 or U8")),
        (int4, ordered, (UP + "_g_idx", "another order")),
        (int4, scheme(num_bits=3), ("compressed-tensors", "group_0", "3-bit int")),
        (int4, scheme(group_size=-1), ("compressed-tensors", "groups of -1")),
        (int4, scheme(symmetric=False), ("down_proj.weight_packed", "fits none")),
        (int4, scheme(strategy="token"), ("compressed-tensors", "'token'")),
        (zeros, bytes_of_zeros, (UP + "_zero_point[70, 0] is 9", "from -8 to 7")),
        (zeros, cut(UP + "_zero_point"), (UP + "_zero_point", "[15, 1]", "fits none")),
        (nvfp4, drop(UP + "_global_scale"), (UP + "_packed", "no " + UP + "_global_scale")),
        (nvfp4, put(UP + "_global_scale", (0,), float("nan")), (UP + "_global_scale is nan",)),
        (nvfp4, put(UP + "_global_scale", (0,), 0), (UP + "_global_scale is 0",)),
        (nvfp4, cut(UP + "_scale"), (UP + "_scale", "[127, 4]", "[128, 4]")),
        (nvfp4_of_modelopt, smoothed, ("pre_quant_scale", "scales the inputs")),
        (nvfp4_of_modelopt, cast(UP + "_scale_2", torch.float16), (UP + "_scale_2", "F16", "F32")),
        (nvfp4_of_modelopt, drop(UP + "_scale"), (UP, "no " + UP + "_scale")),
        (nvfp4_of_modelopt, drop(UP), (UP + "_scale_2", "no NVFP4 weight")),
    ],
    ids=lambda x: "" if isinstance(x, tuple) else x.__name__,
)  # fmt: skip
def test_what_does_not_fit_is_refused(work, make, change, says):
    broken(work, make, change)
    refused(INPUT, "quantize", "model", "-q", says=says, cwd=work)
    refused(INPUT, "quantize", "model", "-q", "--on-nonfinite", "keep", says=says, cwd=work)


def test_the_plan_says_that_this_is_a_second_rounding(tmp_path):
    int4(tmp_path / "model")
    said = nf4_ok("quantize", tmp_path / "model", "--plan")
    assert "stored in INT4" in said
    assert "rounded a second time" in said


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("gptq", {}),
        ("gptq", {"desc_act": True}),
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("awq", {"version": "gemm"}),
    ],
    ids=str,
)
def test_gptq_and_awq_are_taken_when_asked(tmp_path, method, config):
    decoded = gptq_or_awq(tmp_path / "source", method, **config)
    write_checkpoint_dir(tmp_path / "plain", decoded, LLAMA)
    keep = ("--keep", "o_proj")
    nf4_ok("quantize", tmp_path / "source", tmp_path / "a", "--requantize", *keep)
    nf4_ok("quantize", tmp_path / "plain", tmp_path / "b", *keep)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert "is good" in nf4_ok("verify", tmp_path / "a", "--source", tmp_path / "source")
    assert (
        json.loads((tmp_path / "a/nf4_manifest.json").read_text())["recipe"]["requantize"] is True
    )
    assert "requantize" not in (tmp_path / "b/nf4_manifest.json").read_text()


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_gptq_and_awq_in_many_pieces(tmp_path, layout):
    """Pieces begin and end within rows, and within words."""
    generator = torch.Generator().manual_seed(17)
    high, wide = (300, 584) if layout == "gptq" else (584, 150)
    columns, rows = (8 * high, wide) if layout == "gptq" else (high, 8 * wide)
    bits = torch.randint(-(2**31), 2**31, (high, wide), generator=generator).to(torch.int32)
    tensors = {
        "a.qweight": bits, "a.scales": torch.rand(columns // 8, rows).half(),
        "a.qzeros": torch.zeros(columns // 8, rows // 8, dtype=torch.int32),
    }  # fmt: skip
    config = {"quantization_config": {"quant_method": layout, "bits": 4}, "model_type": "x"}
    write_checkpoint_dir(tmp_path / "source", tensors, config)
    made = []
    for chunk in (8 * GRANULE, 8 << 20):
        checkpoint = open_checkpoint(tmp_path / "source")
        plan = make_plan(checkpoint, QuantConfig(requantize=True, dtype="float16"), lambda _: None)
        out = tmp_path / str(chunk)
        carry_out(plan, out, engines.load("cpu"), Resources(2, chunk, 0))
        made.append(read_all(out))
    assert rows * columns > 8 * GRANULE
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptq_and_awq_are_refused_by_default(work, method):
    gptq_or_awq(work / method, method)
    says = ("already quantized", repr(method), "original full-precision", "--requantize")
    refused(INPUT, "quantize", method, says=says, cwd=work)


def wrong_group(t: dict, c: dict) -> None:
    t[UP.replace("weight", "g_idx")][7] = 2


def gptq(root: Path) -> object:
    return gptq_or_awq(root, "gptq")


def option(**more: object) -> Callable[[dict, dict], None]:
    return lambda t, c: c["quantization_config"].update(more)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (option(bits=8), ("'gptq' with 8 bits",)),
        (option(checkpoint_format="marlin"), ("'marlin'",)),
        (drop(UP.replace("weight", "qzeros")), ("no " + UP.replace("weight", "qzeros"),)),
        (drop(UP.replace("weight", "qweight")), ("no qweight beside it",)),
        (cut(UP.replace("weight", "scales")), ("up_proj.qzeros", "[2, 16]", "[1, 16]")),
        (wrong_group, ("up_proj.g_idx[7] is 2", "from 0 to 1")),
    ],
    ids=[
        "8 bits",
        "another layout",
        "no qzeros",
        "no qweight",
        "a short scales",
        "a wrong group",
    ],
)
def test_gptq_that_does_not_fit_is_refused(work, change, says):
    broken(work, gptq, change)
    refused(INPUT, "quantize", "model", "-q", "--requantize", says=says, cwd=work)


def test_inspect_counts_the_weights_and_not_their_scales(tmp_path):
    decoded = compressed_model(tmp_path / "mixed", SCHEMES["mixed"])
    seen = json.loads(nf4_ok("inspect", tmp_path / "mixed", "--json"))
    assert seen["parameters"] == sum(value.numel() for value in decoded.values())
    kinds = {group["kind"].partition(",")[0] for group in seen["groups"]}
    assert kinds == {"INT4", "INT8", "NVFP4", "BF16"}
    gptq(tmp_path / "gptq")
    assert json.loads(nf4_ok("inspect", tmp_path / "gptq", "--json"))["parameters"] > 100_000


@pytest.mark.parametrize("held", [1 << 20, 0], ids=["factors in memory", "factors in the file"])
@pytest.mark.parametrize("target", ["transformers", "unsloth"])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, held, target):
    """Also where every slice of the factors is read from its file."""
    monkeypatch.setattr(conversion, "_HELD", held)
    gpt_oss(tmp_path / "source")
    plan = make_plan(open_checkpoint(tmp_path / "source"), QuantConfig(target=target))
    engine, resources = engines.load("cpu"), Resources(1, 8 * GRANULE, 0)
    carry_out(plan, tmp_path / "whole", engine, resources)
    done: list[str] = []

    def stop(name: str, count: int) -> None:
        done.append(name)
        if len(done) > len(plan.tensors) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, tmp_path / "out", engine, resources, progress=stop)
    assert not (tmp_path / "out").exists()
    carry_out(plan, tmp_path / "out", engine, resources, resume=True)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_factors_that_change_during_a_run_are_noticed(tmp_path, monkeypatch):
    gpt_oss(tmp_path / "source", shards=1)
    plan = make_plan(open_checkpoint(tmp_path / "source"), QuantConfig())
    path = tmp_path / "source/model.safetensors"
    place = next(t for t in plan.checkpoint.shards[0].tensors if t.name == GATE_UP + "_scales")
    changed: list[str] = []

    def change(name: str, count: int) -> None:
        if name == GATE_UP and not changed:
            changed.append(name)
            with path.open("r+b") as file:
                file.seek(place.start + 40)
                file.write(b"\x70")

    with pytest.raises(InputError, match="changed while it was being read"):
        carry_out(
            plan, tmp_path / "out", engines.load("cpu"), Resources(1, 8 * GRANULE, 0),
            progress=change,
        )  # fmt: skip
    assert changed


def test_on_the_hub_headers_have_to_be_enough(tmp_path):
    """A plan of a model on the Hub has no bytes of weight_shape: a run looks at it."""
    origin = Origin("org/model", "0" * 40, {})
    compressed_model(tmp_path / "alike", SCHEMES["int4 and int8 whose headers look alike"])
    alike = replace(open_checkpoint(tmp_path / "alike"), origin=origin)
    with pytest.raises(InputError, match="fits several config_groups"):
        make_plan(alike, QuantConfig())
    broken(tmp_path, int4, put(UP + "_shape", (1,), 63))
    model = replace(open_checkpoint(tmp_path / "model"), origin=origin)
    plan = make_plan(model, QuantConfig())
    with pytest.raises(InputError, match="says that the weight's shape is"):
        carry_out(plan, tmp_path / "out", engines.load("cpu"), Resources(1, 8 << 20, 0))
    assert not (tmp_path / "out").exists()
