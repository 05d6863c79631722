"""Scales chosen by loss: the same on every engine, the best there are, and proved like all else."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from emulator.exercise import ties
from helpers import (
    LLAMA,
    UP,
    hard_values,
    llama_tensors,
    nf4,
    nf4_ok,
    nightly_but,
    raw,
    same_files,
    write_checkpoint_dir,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_pipelines import component, denoiser

from nf4cli.checkpoint.discovery import IMPORTANCE, MANIFEST, open_checkpoint
from nf4cli.checkpoint.importance_file import load, save
from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.protocol import GRANULE, ChosenScales, Importance, NestedAbsmax
from nf4cli.errors import NonFiniteError
from nf4cli.format.codebook import codebook, ladder
from nf4cli.output.manifest import Manifest

DOWN = "model.layers.0.mlp.down_proj.weight"


def search(engine, x, dtype="F32", blocksize=64, quant_type="nf4", double=True, columns=None,
           first=0):  # fmt: skip
    """(packed, index, unit, stats, decoded scales)."""
    steps = ladder(double, columns is not None)
    packed = np.full((x.numel() + 1) // 2, 0xAB, np.uint8)
    index = np.full(-(-x.numel() // blocksize), 0xCD, np.uint8)
    unit = np.full(-(-index.size // steps.run), np.nan, np.float32)
    importance = None if columns is None else Importance(columns, first)
    stats = engine.search(
        raw(x), dtype, blocksize, quant_type, steps, importance, packed, ChosenScales(index, unit)
    )
    scales = engine.nested_dequantize(NestedAbsmax(index, 0, steps.run, steps.table, unit, 0.0))
    return packed, index, unit, stats, scales


def codes_of(packed, n):
    return np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n]


BLOCKS = [*itertools.product(["F32", "F16", "BF16"], [32, 64, 256, 4096])]
EVERY_COMMIT = [("F32", 64), ("F16", 32), ("BF16", 64), ("BF16", 4096)]


@pytest.mark.parametrize("block", nightly_but(EVERY_COMMIT, BLOCKS), ids=str)
def test_engines_agree_to_the_bit(engine, block):
    dtype, blocksize = block
    reference = CpuEngine("generic")
    generator = np.random.default_rng(blocksize)
    for n in (1, 63, 2_000) if blocksize != 64 else (5_000, GRANULE + 777):
        x = hard_values(dtype, n, n)
        for quant_type, double in (("nf4", True), ("nf4", False), ("fp4", True)):
            weights = np.abs(generator.standard_normal(77).astype(np.float32)) ** 4
            weights[:5] = 0
            for columns in (None, weights, np.zeros(3, np.float32)):
                asked = (x, dtype, blocksize, quant_type, double, columns, 13)
                ours, theirs = search(engine, *asked), search(reference, *asked)
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_array_equal(a, b)
                assert np.isfinite(ours[3]).all()
                assert np.isfinite(ours[4]).all()


@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_engines_agree_where_two_scales_lose_the_same(engine, blocksize):
    """Each rounding, and the order of every sum, decides there which is taken."""
    src, weights = ties(blocksize, 100)
    x = torch.from_numpy(src).view(torch.bfloat16)
    asked = (x, "BF16", blocksize, "nf4", False, weights)
    for a, b in zip(search(engine, *asked), search(CpuEngine("generic"), *asked), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("blocksize", [64, 512])
def test_the_first_value_that_is_no_number_is_named(engine, blocksize):
    """With blocks of 512, what comes after it in another granule shares its unit."""
    n = 20_000 if blocksize == 64 else 2 * GRANULE
    for place in (0, 700, 16_500):
        x = torch.ones(n)
        x[place], x[n - 1] = float("nan"), float("inf")
        with pytest.raises(NonFiniteError) as caught:
            search(engine, x, blocksize=blocksize)
        assert caught.value.index == place
    x[place] = 1
    with pytest.raises(NonFiniteError) as caught:
        search(engine, x, blocksize=blocksize)
    assert caught.value.index == n - 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from([32, 64, 128]))
def test_no_allowed_scale_is_better_and_no_code_nearer(seed, double, weighted, blocksize):
    generator = np.random.default_rng(seed)
    x = torch.from_numpy(
        (generator.standard_normal(40 * blocksize) * generator.choice([1, 1, 9])).astype(np.float32)
    )
    columns = generator.exponential(size=50).astype(np.float32) if weighted else None
    packed, _, unit, _, scales = search(
        CpuEngine(), x, blocksize=blocksize, double=double, columns=columns
    )
    steps, book = ladder(double, weighted), codebook("nf4")
    blocks = x.double().numpy().reshape(-1, blocksize)
    weight = np.resize(columns, x.numel()).reshape(blocks.shape) if weighted else None
    values = book.values.astype(np.float64)

    def loss(number, scale):
        scaled = blocks[number] / scale
        error = scaled - values[np.searchsorted(book.midpoints.astype(np.float64), scaled)]
        factor = np.abs(blocks[number]) if weight is None else weight[number]
        return float((factor * (error * scale) ** 2).sum())

    for number, scale in enumerate(scales.astype(np.float64)):
        absmax = np.abs(blocks[number]).max()
        tried = steps.steps.astype(np.float64) * unit[number // steps.run]
        inside = (np.abs(tried) > steps.low * absmax * (1 + 1e-6)) & (
            np.abs(tried) < steps.high * absmax * (1 - 1e-6)
        )
        for other in tried[inside]:
            assert loss(number, scale) <= loss(number, other) * (1 + 1e-4) + 1e-30
        decoded = book.decode[codes_of(packed, x.numel())].reshape(blocks.shape)[number] * scale
        best = np.abs(blocks[number][:, None] - values * scale).min(1)
        assert (np.abs(blocks[number] - decoded) <= best * (1 + 1e-5) + 1e-7).all()


def test_both_signs_are_taken_and_the_loss_falls():
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1))
    _, _, _, stats, scales = search(CpuEngine(), x)
    assert 0.2 < (scales < 0).mean() < 0.8
    packed, absmax = np.empty(x.numel() // 2, np.uint8), np.empty(x.numel() // 64, np.float32)
    plain = CpuEngine().quantize(raw(x), "F32", 64, "nf4", packed, absmax)
    assert stats[:, 0].sum() < 0.97 * plain[:, 0].sum()
    assert stats[:, 1].sum() == pytest.approx(plain[:, 1].sum(), rel=1e-5)


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def importance(tmp_path_factory):
    """Of the tests' Llama: random, a column without any input among them."""
    generator = np.random.default_rng(5)
    columns = {
        name: generator.exponential(size=t.shape[1]).astype(np.float32)
        for name, t in llama_tensors().items()
        if "proj" in name
    }
    columns[UP][3] = 0
    path = tmp_path_factory.mktemp("importance") / "importance.dat"
    save(path, columns, {"tokens": 1})
    return path


OPTIONS = {
    "search": ("--scale", "search"),
    "plain": ("--scale", "search", "--no-double-quant"),
    "fp4": ("--scale", "search", "--quant-type", "fp4", "--blocksize", "128"),
    "wide": ("--scale", "search", "--blocksize", "4096"),
}


@pytest.fixture(scope="module")
def outputs(llama, importance, tmp_path_factory):
    root = tmp_path_factory.mktemp("searched")
    for name, options in {**OPTIONS, "importance": ("--importance", importance)}.items():
        nf4_ok("quantize", llama, root / name, *options)
    return root


@pytest.mark.parametrize("name", [*OPTIONS, "importance"])
def test_verified_on_all_levels(outputs, llama, name, tmp_path):
    out = outputs / name
    assert "is good" in nf4_ok("verify", out)
    told = nf4_ok("verify", out, "--source", llama)
    assert "every byte is the one the source gives" in told
    bare = tmp_path / name
    shutil.copytree(out, bare)
    (bare / MANIFEST).unlink()
    assert "is good" in nf4_ok("verify", bare)
    if name not in ("plain", "importance"):  # those say nothing of it in their states alone
        assert "is good" in nf4_ok("verify", bare, "--source", llama)


def test_absmax_is_the_default_and_says_nothing_new(llama_nf4, llama, tmp_path):
    recipe = json.loads((llama_nf4 / MANIFEST).read_text())["recipe"]
    assert not {"scale", "method", "importance"} & recipe.keys()
    nf4_ok("quantize", llama, tmp_path / "out", "--scale", "absmax")
    assert same_files(llama_nf4, tmp_path / "out")


@pytest.mark.parametrize("options", [("--engine", "torch"), ("--workers", "1"),
                                     ("--memory", "80MB", "--workers", "2")])  # fmt: skip
def test_the_same_bytes_by_every_way(outputs, llama, importance, options, tmp_path):
    nf4_ok("quantize", llama, tmp_path / "out", "--importance", importance, *options)
    assert same_files(outputs / "importance", tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*OPTIONS, "importance"])
def test_the_gpu_too(outputs, llama, importance, gpu_nf4, monkeypatch, name, tmp_path):
    """Its own kernels, and not the CPU engine that it extends."""
    monkeypatch.delattr(CpuEngine, "search")
    options = OPTIONS.get(name, ("--importance", importance))
    done = gpu_nf4("quantize", llama, tmp_path / "out", "--device", "cuda", *options)
    assert same_files(outputs / name, tmp_path / "out")
    assert "GPU 0" in done.stderr.splitlines()[-1]


def test_the_manifest_records_it(outputs, importance):
    manifest = Manifest.from_file(outputs / "importance" / MANIFEST)
    assert manifest.config.scale == "search"
    assert manifest.config.importance == load(importance).digest
    assert (outputs / "importance" / IMPORTANCE).read_bytes() == importance.read_bytes()
    assert IMPORTANCE in manifest.output_files
    states = [t.state for t in manifest.tensors.values() if t.state]
    assert {s.nested_offset for s in states} == {0.0}


@pytest.mark.parametrize("what", ["", ".absmax", ".nested_absmax", "importance"])
def test_a_flipped_bit_is_found(outputs, llama, what, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(outputs / "importance", out)
    if what == "importance":
        path = out / IMPORTANCE
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
    else:
        from nf4cli.checkpoint.reader import read_shard

        (path,) = out.glob("*.safetensors")
        (tensor,) = (t for t in read_shard(path).tensors if t.name == UP + what)
        data = bytearray(path.read_bytes())
        data[tensor.start + 1] ^= 1
    path.write_bytes(data)
    done = nf4("verify", out, "--source", llama)
    assert done.returncode == 1
    assert (IMPORTANCE if what == "importance" else UP + what) in done.stdout


def test_a_weight_that_the_file_does_not_know(llama, importance, tmp_path):
    found = dict(load(importance).columns)
    del found[UP]
    found[DOWN] = np.zeros_like(found[DOWN])
    save(tmp_path / "some.dat", found, {})
    told = nf4_ok("quantize", llama, tmp_path / "out", "--importance", tmp_path / "some.dat")
    assert f"nothing is known of the inputs of {UP}" in told
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", llama)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--scale", "best"), 2, "--scale best is not one of absmax, search"),
        (("--scale", "absmax", "--importance", "F"), 2, "leave out --importance"),
        (("--method", "gptq"), 2, "--method needs --calibration"),
        (("--save-importance", "x"), 2, "--save-importance needs --calibration"),
        (("--importance", "F", "--calibration", "t"), 2, "leave one of them out"),
        (("--calibration", "t", "--calibration-length", "4"), 2, "is below 8"),
        (("--calibration", "t", "--calibration-tokens", "9"), 2, "less than one window"),
        (("--calibration", "t", "--damping", "0"), 2, "not above 0"),
        (("--calibration", "t", "--method", "awq"), 2, "not one of rtn, gptq"),
        (("--importance", "nowhere"), 3, "does not exist"),
        (("--importance", "negative"), 3, "negative or not finite"),
        (("--importance", "nan"), 3, "negative or not finite"),
        (("--importance", "other"), 3, "measured on another model"),
        (("--importance", "narrow"), 3, "measured on another model"),
        (("--importance", "newer"), 3, "version 2"),
        (("--importance", "none"), 3, "is no importance file"),
        (("--importance", "matrix"), 3, "one value an input column"),
        (("--scale", "search", "--blocksize", "4096", "--memory", "80MB"), 2, "--memory"),
    ],
)
def test_what_is_refused(llama, importance, options, code, says, tmp_path):
    good = dict(load(importance).columns)
    for name, values in (("negative", -1), ("nan", np.nan)):
        save(tmp_path / name, {**good, UP: np.full(64, values, np.float32)}, {})
    save(tmp_path / "other", {"encoder.weight": np.ones(4, np.float32)}, {})
    save(tmp_path / "narrow", {**good, UP: np.ones(63, np.float32)}, {})
    save(tmp_path / "F", good, {})
    save_file({UP: np.ones(64, np.float32)}, tmp_path / "none")
    about = {"nf4_importance": '{"version": 2}'}
    save_file({UP: np.ones(64, np.float32)}, tmp_path / "newer", about)
    save_file({UP: np.ones((8, 8), np.float32)}, tmp_path / "matrix",
              {"nf4_importance": '{"version": 1}'})  # fmt: skip
    (tmp_path / "t").write_text("text")
    done = nf4("quantize", llama, "out", *options, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_pipeline_can_be_searched_but_not_weighted(importance, tmp_path):
    component(tmp_path / "pipe/transformer", denoiser(), {"_class_name": "FluxTransformer2DModel"})
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    nf4_ok("quantize", tmp_path / "pipe", tmp_path / "out", "--scale", "search")
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", tmp_path / "pipe")
    done = nf4("quantize", tmp_path / "pipe", tmp_path / "no", "--importance", importance)
    assert (done.returncode, "components are not calibrated" in done.stderr) == (2, True)


def test_transposed_weights_go_by_their_input_columns(tmp_path):
    """Conv1D stores [in, out]: what is written is its transpose, whose columns are the inputs."""
    generator = torch.Generator().manual_seed(3)
    stored = torch.randn(96, 64, generator=generator)  # 96 inputs
    config = {**LLAMA, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 96,
              "n_layer": 1, "num_hidden_layers": 1, "n_head": 4, "vocab_size": 512}  # fmt: skip
    name = "h.0.mlp.c_fc.weight"
    write_checkpoint_dir(tmp_path / "conv", {name: stored}, config)
    turned = {"model.layers.0.mlp.up_proj.weight": stored.T.contiguous()}
    write_checkpoint_dir(tmp_path / "linear", turned, {**LLAMA, "num_hidden_layers": 1})
    columns = np.random.default_rng(0).exponential(size=96).astype(np.float32)
    for directory, key in (("conv", name), ("linear", UP)):
        save(tmp_path / f"{directory}.dat", {key: columns}, {})
        nf4_ok("quantize", tmp_path / directory, tmp_path / f"{directory}-out",
               "--importance", tmp_path / f"{directory}.dat")  # fmt: skip
    outputs = [Manifest.from_file(tmp_path / f"{d}-out" / MANIFEST).tensors[k]
               for d, k in (("conv", name), ("linear", UP))]  # fmt: skip
    assert outputs[0].transposed
    assert outputs[0].outputs[name] == outputs[1].outputs[UP]


def test_from_a_hub_to_a_hub_with_importance(nf4_hub, model, tmp_path):
    """The file goes with the output, and proves it from there."""
    columns = {
        t.name: np.random.default_rng(0).exponential(size=t.shape[-1]).astype(np.float32)
        for shard in open_checkpoint(model).shards
        for t in shard.tensors
        if "proj" in t.name
    }
    save(tmp_path / "importance.dat", columns, {"tokens": 1})
    nf4_hub.ok("quantize", "org/model", "--importance", tmp_path / "importance.dat", "--push-to",
               "me/it", "--disk", "60MB", "--max-shard-size", "1MB")  # fmt: skip
    told = nf4_hub.ok("verify", "me/it", "--source", "org/model")
    assert "every byte is the one the source gives" in told
