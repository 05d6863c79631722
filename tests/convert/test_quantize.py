"""The conversion: same bytes however it is cut up, nothing lost, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import blake3
import numpy as np
import pytest
import torch
import xxhash
from helpers import (
    LLAMA,
    TORCH_DTYPES,
    bnb_nested,
    bnb_quantize,
    carry_out,
    llama_tensors,
    nf4,
    nf4_ok,
    raw,
    read_all,
    same_files,
    write_checkpoint_dir,
)

from nf4cli import engines
from nf4cli.checkpoint.discovery import MANIFEST, open_checkpoint
from nf4cli.checkpoint.writer import fill_shards
from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.protocol import GRANULE
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import Resources, make_resources


def convert(source, output, engine="cpu", workers=1, chunk=None, **options):
    plan = make_plan(open_checkpoint(source), QuantConfig(**options))
    chosen = engines.load(engine)
    resources = make_resources(chosen, workers, None, 2)
    if chunk:
        resources = replace(resources, chunk=chunk)
    return plan, carry_out(plan, output, chosen, resources)


def large(tmp_path, dtype="BF16", shards=1):
    """A checkpoint with tensors of several granules, odd sizes, and other dtypes beside."""
    generator = torch.Generator().manual_seed(3)
    t = TORCH_DTYPES[dtype]
    tensors = {
        "model.embed_tokens.weight": torch.randn(70, 33, generator=generator).to(t),
        "model.layers.0.mlp.up_proj.weight": torch.randn(1001, 701, generator=generator).to(t),
        "model.layers.0.mlp.down_proj.weight": torch.randn(3, 7, generator=generator).to(t),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(5, 100).to(t),
        "model.layers.0.norm.weight": torch.randn(70_000, generator=generator),
        "model.layers.0.half.weight": torch.randn(5, generator=generator).half(),
        "model.layers.0.ids": torch.arange(11),
        "model.layers.0.mask": torch.tensor([True, False, True]),
        "model.layers.0.empty": torch.zeros(0, 4),
        "model.layers.0.scalar": torch.tensor(3.5),
    }
    return write_checkpoint_dir(
        tmp_path / "src", tensors, {**LLAMA, "vocab_size": 70, "num_hidden_layers": 1}, shards
    )


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES))
@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"quant_type": "fp4", "blocksize": 4096}, {"blocksize": 32}],
    ids=str,
)
def test_every_component_is_bitsandbytes(tmp_path, dtype, options):
    source = large(tmp_path, dtype)
    plan, _ = convert(source, tmp_path / "out", chunk=GRANULE * 4, workers=2, **options)
    tensors, out = read_all(source), read_all(tmp_path / "out")
    config = plan.config
    packed_names = [t.name for t in plan.tensors if t.action == "quantize"]
    assert len(packed_names) == 3
    for name in packed_names:
        packed, absmax = bnb_quantize(tensors[name], config.blocksize, config.quant_type)
        assert np.array_equal(out[name].reshape(-1).numpy(), packed)
        state = json.loads(
            out[f"{name}.quant_state.bitsandbytes__{config.quant_type}"].numpy().tobytes()
        )
        assert state["shape"] == list(tensors[name].shape)
        if not config.double_quant:
            assert np.array_equal(out[f"{name}.absmax"].numpy(), absmax)
            continue
        # The offset is the float64 mean; torch's float32 mean may differ in the last bits.
        assert state["nested_offset"] == pytest.approx(float(absmax.mean()), rel=1e-6)
        codes, nested = bnb_nested(absmax, state["nested_offset"])
        assert np.array_equal(out[f"{name}.absmax"].numpy(), codes)
        assert np.array_equal(out[f"{name}.nested_absmax"].numpy(), nested)


def test_kept_tensors_are_copied_or_cast_to_one_dtype(tmp_path):
    source = large(tmp_path)
    convert(source, tmp_path / "out")
    before, after = read_all(source), read_all(tmp_path / "out")
    for name in before:
        if name + ".absmax" in after:
            continue
        expected = before[name]
        if expected.is_floating_point():
            expected = expected.to(torch.bfloat16)
        assert after[name].dtype == expected.dtype
        assert torch.equal(after[name], expected), name


def test_bytes_do_not_depend_on_engine_workers_chunks_or_sharding(tmp_path):
    source = large(tmp_path)
    convert(source, tmp_path / "a")
    for i, options in enumerate((
        {"workers": 2}, {"workers": 5, "chunk": GRANULE * 4}, {"engine": "torch"},
        {"workers": 3, "chunk": GRANULE * 8},
    )):  # fmt: skip
        convert(source, tmp_path / str(i), **options)
        assert same_files(tmp_path / "a", tmp_path / str(i))
    split = large(tmp_path / "split", shards=3)
    convert(split, tmp_path / "s", workers=2)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "s")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_gpt2_is_encoded_transposed_in_chunks_and_whole(tmp_path):
    generator = torch.Generator().manual_seed(1)
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = torch.randn(300, 1234, generator=generator).bfloat16()
    source = write_checkpoint_dir(
        tmp_path / "src", {name: weight, "transformer.wte.weight": torch.zeros(8, 4).bfloat16()},
        {"model_type": "gpt2", "vocab_size": 8},
    )  # fmt: skip
    expected, _ = bnb_quantize(weight.T.contiguous(), 64, "nf4")
    for i, chunk in enumerate((None, GRANULE * 4)):
        _, manifest = convert(source, tmp_path / str(i), chunk=chunk, workers=2)
        out = read_all(tmp_path / str(i))
        assert np.array_equal(out[name].reshape(-1).numpy(), expected)
        state = json.loads(out[f"{name}.quant_state.bitsandbytes__nf4"].numpy().tobytes())
        assert state["shape"] == [1234, 300]
        digest = xxhash.xxh3_128_hexdigest(raw(weight))
        assert manifest.tensors[name].source_digest == digest


def test_the_plan_is_what_happens(tmp_path, llama):
    for options in ({}, {"double_quant": False, "max_shard_size": 1_000_000}):
        plan, _ = convert(llama, tmp_path / str(len(options)), **options)
        out = tmp_path / str(len(options))
        assert {s.filename: s.size for s in plan.shards} == {
            f.name: f.stat().st_size for f in out.glob("*.safetensors")
        }
        tensors = read_all(out)
        assert {k: tuple(t.shape) for k, t in tensors.items()} == {
            k: shape for t in plan.tensors for k, (_, shape) in t.outputs.items()
        }
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        assert plan.bits_per_weight == pytest.approx(8 * nbytes / plan.parameters)


def test_sharding_and_index(tmp_path):
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1000, 1024).bfloat16() for i in range(6)
    }
    source = write_checkpoint_dir(tmp_path / "src", tensors, {**LLAMA, "num_hidden_layers": 6})
    nf4_ok("quantize", source, tmp_path / "out", "--max-shard-size", "1.2MB")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(tmp_path / "out")  # checks the index against the headers
    total = sum(t.nbytes for _, t in checkpoint.tensors.values())
    assert index["metadata"]["total_size"] == total
    for name in tensors:
        keys = [k for k in index["weight_map"] if k.startswith(name)]
        assert len(keys) == 6
        assert len({index["weight_map"][k] for k in keys}) == 1
    nf4_ok("verify", tmp_path / "out", "--source", source)


def of_five_files(root):
    """A source of ten weights, of 190 kB in 4 bit, two in each file."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(10)]
    weights = {name: torch.randn(512, 720).bfloat16() for name in names}
    return write_checkpoint_dir(root, weights, {**LLAMA, "num_hidden_layers": 10}, shards=5)


def test_shards_end_where_source_files_do(tmp_path):
    """A shard of 1 MB holds four weights, and not five."""
    source = of_five_files(tmp_path / "src")
    nf4_ok("quantize", source, tmp_path / "out", "--max-shard-size", "1MB")
    in_source = {name: shard for name, (shard, _) in open_checkpoint(source).tensors.items()}
    made_of = [
        {in_source[t.name].path for t in shard.tensors if t.name in in_source}
        for shard in open_checkpoint(tmp_path / "out").shards
    ]
    assert [len(paths) for paths in made_of] == [2, 2, 1]
    assert len(set().union(*made_of)) == 5, "no source file is in two shards"
    recipe = json.loads((tmp_path / "out" / MANIFEST).read_text())["recipe"]
    assert recipe["shard_cuts"] == "source"
    nf4_ok("verify", tmp_path / "out", "--source", source)


def test_outputs_of_0_2_are_proved_by_their_own_cuts(tmp_path):
    source = of_five_files(tmp_path / "src")
    config = QuantConfig(max_shard_size=1_000_000, shard_cuts="")
    plan = make_plan(open_checkpoint(source), config)
    manifest = carry_out(plan, tmp_path / "out", CpuEngine(), Resources(2, 8 << 20, 0))
    assert len(plan.shards) == 2, "filled to the end"
    assert "shard_cuts" not in manifest.config.as_dict()
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


@pytest.mark.parametrize(
    ("sizes", "groups", "expected"),
    [
        ([4, 4, 4, 4], "aabb", ["aa", "bb"]),
        ([4, 4, 2, 4], "aabb", ["aa", "bb"]),  # the 2 would fit, but not its group
        ([2, 2, 2, 2], "aabb", ["aabb"]),
        ([4, 4, 4, 4, 2], "aaaab", ["aa", "aab"]),  # a group larger than a file is cut
        ([2, 9, 9, 2], "abbc", ["a", "b", "b", "c"]),
        ([12, 2], "ab", ["a", "b"]),
        ([], "", [""]),
    ],
)
def test_groups_stay_together_where_they_fit(sizes, groups, expected):
    items = list(zip(groups, sizes, strict=True))
    files = fill_shards(items, lambda item: [(item[0], "I8", (item[1],))], 10, lambda item: item[0])
    assert ["".join(name for name, _ in file) for file in files] == expected


def test_every_tensor_is_aligned(tmp_path):
    convert(large(tmp_path), tmp_path / "out")
    for shard in open_checkpoint(tmp_path / "out").shards:
        assert shard.data_start % 8 == 0
        for tensor in shard.tensors:
            width = tensor.nbytes // tensor.numel if tensor.numel else 1
            assert (tensor.start - shard.data_start) % width == 0


def test_digests_are_those_of_public_tools(tmp_path, llama):
    _, manifest = convert(llama, tmp_path / "out", workers=2)
    for root, records in (
        (llama, manifest.source_files),
        (tmp_path / "out", manifest.output_files),
    ):
        for name, record in records.items():
            data = (root / name).read_bytes()
            assert record.digest == blake3.blake3(data).hexdigest()
            assert record.size == len(data)
    out = read_all(tmp_path / "out")
    for record in manifest.tensors.values():
        for key, digest in record.outputs.items():
            assert digest == xxhash.xxh3_128_hexdigest(raw(out[key]))


def test_errors_are_close_to_what_decoding_shows(tmp_path):
    weight = torch.randn(512, 700, generator=torch.Generator().manual_seed(9))
    source = write_checkpoint_dir(tmp_path / "src", {"a.0.b.weight": weight}, LLAMA)
    _, manifest = convert(source, tmp_path / "out")
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back")
    error = (read_all(tmp_path / "back")["a.0.b.weight"] - weight).double()
    record = manifest.tensors["a.0.b.weight"].error
    assert record.rel_rmse == pytest.approx(float(error.norm() / weight.double().norm()), rel=5e-3)
    assert record.max_abs == pytest.approx(float(error.abs().max()), rel=0.1)


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    source = write_checkpoint_dir(tmp_path / "src", llama_tensors(), LLAMA)
    keep = {
        "tokenizer.json": "{}", "chat_template.jinja": "x", "generation_config.json": "{}",
        "modeling_custom.py": "x = 1", "1_Pooling/config.json": "{}",
        "additional_chat_templates/a.jinja": "deep",
    }  # fmt: skip
    leave = ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "consolidated.safetensors",
             "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "training_args.bin",
             "pytorch_model.bin.index.json", ".git/HEAD", ".cache/huggingface/x",
             ".gitattributes", ".gitignore", "assets/a/b.txt"]  # fmt: skip
    for name, text in keep.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    for name in leave:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("weights")
    nf4_ok("quantize", source, tmp_path / "out")
    for name, text in keep.items():
        assert (tmp_path / "out" / name).read_text() == text
    for name in leave:
        assert not (tmp_path / "out" / name).exists()


def test_small_modules_of_sentence_transformers_are_copied(tmp_path):
    source = write_checkpoint_dir(tmp_path / "src", llama_tensors(), LLAMA)
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    write_checkpoint_dir(source / "2_Dense", {"linear.weight": torch.zeros(2, 2)})
    write_checkpoint_dir(source / "other", {"linear.weight": torch.zeros(2, 2)})
    nf4_ok("quantize", source, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()
    part = (source / "other" / "model.safetensors").read_bytes()  # other tensors than the model's
    assert (tmp_path / "out" / "other" / "model.safetensors").read_bytes() == part


def test_config_is_rewritten(tmp_path, llama):
    nf4_ok("quantize", llama, tmp_path / "out", "--compute-dtype", "float16")
    before = json.loads((llama / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["load_in_4bit"] is True
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_compute_dtype"] == "float16"
    assert "lm_head" in quantization["llm_int8_skip_modules"]
    assert len(quantization) == 13


def test_one_file_without_a_config(tmp_path):
    write_checkpoint_dir(tmp_path, llama_tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    text = nf4_ok("quantize", "weights.safetensors", cwd=tmp_path)
    assert "no config.json" in text
    out = tmp_path / "weights-nf4"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.safetensors", MANIFEST]
    nf4_ok("verify", out, "--source", tmp_path / "weights.safetensors")


def test_default_output_is_named_after_the_source(tmp_path, llama):
    nf4_ok("quantize", llama, cwd=tmp_path)
    assert (tmp_path / "llama-nf4" / MANIFEST).is_file()


def test_memory_is_kept(tmp_path):
    """A tensor far larger than the bound goes through it."""
    weight = torch.randn(1 << 26, dtype=torch.float32).bfloat16().reshape(8192, 8192)
    source = write_checkpoint_dir(tmp_path / "src", {"a.0.b.weight": weight}, LLAMA)
    code = (
        "import sys; sys.argv = ['nf4', *sys.argv[1:]]\n"
        "from nf4cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    for bound in (80_000_000, 120_000_000):
        out = tmp_path / str(bound)
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, "quantize", source, out, "-q", f"--memory={bound}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(done.stdout) * 1024 <= bound


def test_json_is_one_document(tmp_path, llama):
    plan = json.loads(nf4_ok("quantize", llama, tmp_path / "out", "--plan", "--json"))
    assert not (tmp_path / "out").exists()
    done = nf4("quantize", llama, tmp_path / "out", "--json")
    result = json.loads(done.stdout)
    assert "error" not in done.stderr
    assert result["output_bytes"] == plan["output_bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )  # fmt: skip
    assert len(plan["tensors"]) == len(open_checkpoint(llama).tensors)
    assert all(t["reason"] for t in plan["tensors"])
    assert len(result["errors"]) == 14
