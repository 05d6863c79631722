"""What a source is, is read off its tensors first: quantization, dtype, names, the weight file."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    UP,
    USAGE,
    llama_tensors,
    nf4_ok,
    raw,
    read_all,
    refused,
    same_files,
    write_checkpoint_dir,
)
from safetensors.torch import save_file

from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.torch import TorchEngine
from nf4cli.errors import NonFiniteError

FAMILIES = Path(__file__).parent.parent / "goldens" / "families.json"
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def converted(root: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None):
    """Convert a checkpoint and prove the output; returns (output, the notes of the plan)."""
    source = write_checkpoint_dir(root, tensors, config or LLAMA)
    return carried_out(source)


def tensor_bytes(root: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """The bytes of every tensor; in a file their order is that of the source's."""
    return {name: (t.dtype, raw(t).tobytes()) for name, t in read_all(root).items()}


def carried_out(source: Path) -> tuple[Path, list[str]]:
    out = source.with_name(source.name + "-nf4")
    found = json.loads(nf4_ok("quantize", source, out, "--json"))
    nf4_ok("verify", out, "--source", source)
    return out, found["notes"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The output of the same weights without anything unusual."""
    return converted(tmp_path / "plain", llama_tensors())[0]


# -- a quantization_config that the tensors contradict -------------------------------------------


@pytest.mark.parametrize(
    "left",
    [
        BNB,
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {},
        {"quant_method": "fp8"},
    ],
    ids=lambda left: str(left.get("quant_method")),
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_leftover_quantization_config_is_dropped_with_a_note(tmp_path, plain, left, nested):
    config = {**LLAMA, "quantization_config": left}
    if nested:
        config = {**LLAMA, "text_config": {**LLAMA, "quantization_config": left}}
    out, notes = converted(tmp_path / "leftover", llama_tensors(), config)
    assert any("no tensor is: it is a leftover" in note for note in notes)
    assert same_files(out, plain, but=("config.json", "nf4_manifest.json", "README.md"))
    written = json.loads((out / "config.json").read_text())
    assert written["quantization_config"]["_load_in_4bit"] is True
    assert "quantization_config" not in written.get("text_config", {})


def test_a_method_that_quantizes_while_the_model_runs_is_no_leftover(tmp_path):
    config = {**LLAMA, "quantization_config": {"quant_method": "bitnet"}}
    write_checkpoint_dir(tmp_path / "m", llama_tensors(), config)
    refused(INPUT, "quantize", "m", "out", says=("already quantized", "bitnet"), cwd=tmp_path)


def packed_by(program: str) -> dict[str, torch.Tensor]:
    """The tensors of a Llama of which one linear is stored as another program does it."""
    tensors = llama_tensors()
    weight, base = tensors.pop(Q), Q.removesuffix(".weight")
    integers = torch.zeros(64, 8, dtype=torch.int32)
    return tensors | {
        "bitsandbytes 8-bit": {Q: weight.to(torch.int8), f"{base}.SCB": torch.ones(64)},
        "MLX": {Q: integers.view(torch.uint32), f"{base}.scales": weight[:, :2].clone(),
                f"{base}.biases": weight[:, :2].clone()},
        "quanto": {f"{Q}._data": weight.to(torch.int8), f"{Q}._scale": torch.ones(64, 1)},
        "GPTQ or AWQ": {f"{base}.qweight": integers, f"{base}.scales": weight[:8].clone()},
        "HQQ": {f"{base}.W_q": integers.to(torch.uint8)},
        "a program that packs them into I8": {Q: weight.to(torch.int8)},
    }[program]  # fmt: skip


PROGRAMS = [
    "bitsandbytes 8-bit", "MLX", "quanto", "GPTQ or AWQ", "HQQ",
    "a program that packs them into I8",
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", [None, "bitsandbytes", "gptq", "unheard-of"])
def test_quantized_tensors_are_refused_by_the_name_of_their_program(tmp_path, program, method):
    config = LLAMA if method is None else {**LLAMA, "quantization_config": {"quant_method": method}}
    write_checkpoint_dir(tmp_path / "m", packed_by(program), config)
    says = ("already quantized", program, *((repr(method),) if method else ()))
    said = refused(INPUT, "quantize", "m", "out", says=says, cwd=tmp_path)
    assert "nf4 dequantize" not in said


# -- adapters --------------------------------------------------------------------------------------


def lora(spelling: Callable[[str, str], str]) -> dict[str, torch.Tensor]:
    return {
        spelling(module, side): torch.randn(4, 64)
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
        for side in "AB"
    }


@pytest.mark.parametrize(
    "spelling",
    [
        lambda m, side: f"base_model.model.{m}.lora_{side}.weight",
        lambda m, side: f"base_model.model.{m}.lora_{side}.default.weight",
        lambda m, side: f"unet.{m}.lora.{'down' if side == 'A' else 'up'}.weight",
        lambda m, side: (
            f"lora_unet_{m.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight"
        ),
        lambda m, side: f"lora_te1_{m.replace('.', '_')}.hada_w{'1' if side == 'A' else '2'}_a",
        lambda m, side: f"transformer.{m}.lokr_w{'1' if side == 'A' else '2'}",
    ],
    ids=["peft", "peft-named", "diffusers", "kohya", "loha", "lokr"],
)
@pytest.mark.parametrize("file", ["adapter_model", "pytorch_lora_weights", "model", "my-lora"])
def test_an_adapter_given_as_the_source_is_refused_as_one(tmp_path, spelling, file):
    root = tmp_path / "adapter"
    root.mkdir()
    save_file(lora(spelling), root / f"{file}.safetensors")
    (root / "config.json").write_text(json.dumps(LLAMA))
    if file == "adapter_model":
        (root / "adapter_config.json").write_text("{}")
    for source in (root, root / f"{file}.safetensors"):
        refused(INPUT, "quantize", source, "out", says=("adapter", "merge"), cwd=tmp_path)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("base", [".base_layer.weight", ".weight"])
def test_an_unmerged_adapter_inside_a_model_is_refused(tmp_path, prefix, base):
    tensors = {prefix + name: value for name, value in llama_tensors().items()}
    module = prefix + Q.removesuffix(".weight")
    tensors[module + base] = tensors.pop(prefix + Q)
    tensors[f"{module}.lora_A.default.weight"] = torch.randn(4, 64)
    tensors[f"{module}.lora_B.default.weight"] = torch.randn(64, 4)
    write_checkpoint_dir(tmp_path / "m", tensors, LLAMA)
    says = ("not merged", f"{module}.lora_A.default.weight", "merge_and_unload")
    refused(INPUT, "quantize", "m", "out", says=says, cwd=tmp_path)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "base_model.model." + name,
        lambda name: "model." + name,
        lambda name: "model._orig_mod." + name,
        lambda name: name.replace("model.", "model._orig_mod.", 1),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_wrapper_put_into_the_names_is_taken_off(tmp_path, plain, wrapped, shards):
    tensors = {wrapped(name): value for name, value in llama_tensors().items()}
    source = write_checkpoint_dir(tmp_path / "wrapped", tensors, LLAMA, shards)
    out, notes = carried_out(source)
    assert any("they are taken off" in note for note in notes)
    assert tensor_bytes(out) == tensor_bytes(plain)
    recorded = json.loads((out / "nf4_manifest.json").read_text())["tensors"]
    assert recorded[Q]["source"].get("tensor", Q) == wrapped(Q)


def test_two_names_that_differ_in_a_wrapper_only_are_refused(tmp_path):
    tensors = llama_tensors()
    tensors["_orig_mod." + UP] = tensors[UP].clone()
    write_checkpoint_dir(tmp_path / "m", tensors, LLAMA)
    refused(INPUT, "quantize", "m", "out", says=("holds both", UP, "stale"), cwd=tmp_path)


@pytest.mark.parametrize(
    ("model_type", "rename"),
    [
        ("bert", lambda name: name),
        ("gpt2", lambda name: name),
        ("phi3", lambda name: name),
        ("llama", lambda name: name.replace("self_attn.", "a.w_").replace("mlp.", "m.w_")),
    ],
)
def test_names_that_leave_the_model_without_weights_are_refused(tmp_path, model_type, rename):
    tensors = {rename(name): value for name, value in llama_tensors().items()}
    write_checkpoint_dir(tmp_path / "m", tensors, {**LLAMA, "model_type": model_type})
    says = (f"model_type {model_type!r}", "are called", "config.json")
    refused(INPUT, "quantize", "m", "out", says=says, cwd=tmp_path)


def test_every_family_has_its_own_names():
    from nf4cli.checkpoint.types import Checkpoint, Shard, TensorInfo
    from nf4cli.planning import tensor_names

    shard = Shard(Path("x.safetensors"), 0, 0, ())
    for family, facts in json.loads(FAMILIES.read_text()).items():
        names = {name.replace("*", "0"): shape for name, shape in facts["tensors"].items()}
        tensors = {n: (shard, TensorInfo(n, "BF16", tuple(s), 0)) for n, s in names.items()}
        config = {**facts["config"], "model_type": family}
        model = Checkpoint(Path(), "x", (shard,), tensors, config, False, (), ())
        assert tensor_names.names_in_model(model) == {}, family
        tensor_names.check_layers(model)


def test_a_value_head_stays_in_full_precision(tmp_path):
    head = torch.randn(1, 64).bfloat16()
    out, _ = converted(tmp_path / "m", {**llama_tensors(), "v_head.summary.weight": head})
    assert torch.equal(read_all(out)["v_head.summary.weight"], head)


@pytest.mark.parametrize("wrapped", [True, False])
def test_calibration_does_not_run_a_model_that_transformers_reads_otherwise(tmp_path, wrapped):
    tensors, config = llama_tensors(), {**LLAMA, "quantization_config": BNB}
    if wrapped:
        tensors, config = {f"module.{name}": t for name, t in tensors.items()}, LLAMA
    write_checkpoint_dir(tmp_path / "m", tensors, config)
    (tmp_path / "text.txt").write_text("some text " * 500)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    options = ("--scale", "search", "--calibration", "text.txt")
    says = ("wrapper" if wrapped else "leftover", "mend the source")
    refused(USAGE, "quantize", "m", "out", *options, says=says, cwd=tmp_path)


# -- float64 ---------------------------------------------------------------------------------------


def hard_float64(count: int) -> torch.Tensor:
    """Values of every size, and such as lie at, or a little beside, the middle between two values
    of 16 bits, where rounding to float32 first goes wrong."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(count, generator=generator, dtype=torch.float64) * 20 - 15
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 10**size
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 2**-134])
    beside = torch.tensor([0, 2**-40, -(2**-40), 2**-30, -(2**-30)], dtype=torch.float64)
    near = (ties.double()[:, None] * (1 + beside)).reshape(-1)
    values[: near.numel()] = near
    values[near.numel() : 2 * near.numel()] = -near
    return values


def nearest(value: float, dtype: torch.dtype) -> float:
    """The nearest value of a 16-bit dtype, of two the even one, by exact arithmetic."""
    first = torch.tensor(value, dtype=torch.float64).to(dtype)
    bits = int(first.view(torch.int16))
    near = torch.tensor([b for b in (bits - 1, bits, bits + 1) if -32768 <= b < 32768])
    found = near.to(torch.int16).view(dtype)
    pairs = [(abs(Fraction(float(v)) - Fraction(value)), int(b) & 1, float(v))
             for b, v in zip(near, found, strict=True) if torch.isfinite(v)]  # fmt: skip
    return min(pairs)[2]


@pytest.mark.parametrize("engine", [CpuEngine, TorchEngine])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_engine_rounds_float64_once(engine, dtype):
    to = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    values = hard_float64(2000).clamp(-6e4, 6e4)
    out = torch.empty(2000, dtype=to)
    buffer = raw(out)
    engine().cast(raw(values), "F64", buffer, dtype)
    got = torch.from_numpy(buffer).view(to)
    if dtype == "F32":
        assert torch.equal(got, values.float())
        return
    assert got.double().tolist() == [nearest(v, to) for v in values.tolist()]
    assert (got == values.to(to)).float().mean() > 0.98  # torch rounds twice, seldom to another


@pytest.mark.parametrize("engine", [CpuEngine, TorchEngine])
def test_every_engine_says_which_float64_is_too_large(engine):
    values = torch.tensor([1.0, float("inf"), float("nan"), 3.4e38, -1e300, 1e300]).double()
    values[3], values[4], values[5] = 3.39e38, -1e300, 1e300
    for dtype, first in (("F16", 3), ("BF16", 4), ("F32", 4)):
        out = raw(torch.empty(6, dtype=torch.float32 if dtype == "F32" else torch.float16))
        with pytest.raises(NonFiniteError) as error:
            engine().cast(raw(values), "F64", out, dtype)
        assert error.value.index == first


@pytest.mark.parametrize(
    "chosen",
    [[NORM], [UP], ["lm_head.weight"], ["model.embed_tokens.weight"], None],
    ids=["norm", "linear", "head", "embedding", "all"],
)
@pytest.mark.parametrize("options", [(), ("--engine", "torch"), ("--scale", "search")])
def test_float64_gives_the_bytes_of_the_cast_checkpoint(tmp_path, chosen, options):
    tensors = llama_tensors()
    generator = torch.Generator().manual_seed(1)
    doubles = {
        name: (torch.randn(tensors[name].shape, generator=generator) * 0.05).double()
        for name in chosen or tensors
    }  # of which torch, too, rounds each once
    wide = write_checkpoint_dir(tmp_path / "wide", tensors | doubles, LLAMA)
    cast = {name: value.bfloat16() for name, value in doubles.items()}
    narrow = write_checkpoint_dir(tmp_path / "narrow", tensors | cast, LLAMA)
    notes = json.loads(nf4_ok("quantize", wide, tmp_path / "a", "--json", *options))["notes"]
    nf4_ok("quantize", narrow, tmp_path / "b", *options)
    assert any("stored in float64" in note for note in notes)
    assert tensor_bytes(tmp_path / "a") == tensor_bytes(tmp_path / "b")
    nf4_ok("verify", tmp_path / "a", "--source", wide)
    nf4_ok("dequantize", tmp_path / "a", tmp_path / "back")
    assert {t.dtype for t in read_all(tmp_path / "back").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [NORM, UP])
def test_a_float64_beyond_the_dtype_is_refused(tmp_path, name):
    tensors = llama_tensors()
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[3] = 1e300
    write_checkpoint_dir(tmp_path / "m", tensors, LLAMA)
    refused(INPUT, "quantize", "m", "out", says=(name, "too large for BF16"), cwd=tmp_path)


def test_a_nan_in_float64_is_refused_or_kept(tmp_path):
    tensors = llama_tensors()
    tensors[UP] = tensors[UP].double()
    tensors[UP][1, 2] = float("nan")
    write_checkpoint_dir(tmp_path / "m", tensors, LLAMA)
    refused(INPUT, "quantize", "m", "out", says=(f"{UP}[1, 2]", "is NaN"), cwd=tmp_path)
    nf4_ok("quantize", tmp_path / "m", tmp_path / "out", "--on-nonfinite", "keep")
    kept = read_all(tmp_path / "out")[UP]
    assert kept.dtype == torch.bfloat16
    assert int(kept.isnan().sum()) == 1


def test_a_model_in_float64_alone_becomes_float32(tmp_path):
    tensors = {name: value.double() for name, value in llama_tensors().items()}
    out, _ = converted(tmp_path / "m", tensors, {**LLAMA, "torch_dtype": "float64"})
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert read_all(out)[NORM].dtype == torch.float32


# -- the weight file that config.json names --------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
def test_the_weight_file_that_config_json_names_is_the_model(tmp_path, plain, indexed):
    root, tensors = tmp_path / "named", llama_tensors()
    write_checkpoint_dir(root, llama_tensors(seed=9))  # which transformers does not load
    name = "hf.safetensors.index.json" if indexed else "hf.safetensors"
    if indexed:
        names = list(tensors)
        for i in range(2):
            save_file({n: tensors[n] for n in names[i::2]}, root / f"hf-{i}.safetensors")
        weight_map = {n: f"hf-{i % 2}.safetensors" for i, n in enumerate(names)}
        (root / name).write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(tensors, root / name)
    (root / "config.json").write_text(json.dumps({**LLAMA, "transformers_weights": name}))
    out, notes = carried_out(root)
    assert any(name in note and "left" in note and "model.safetensors" in note for note in notes)
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    assert tensor_bytes(out) == tensor_bytes(plain)


@pytest.mark.parametrize("name", ["gone.safetensors", "model.bin", "../model.safetensors", 3])
def test_a_weight_file_that_config_json_names_in_vain_is_refused(tmp_path, name):
    root = write_checkpoint_dir(
        tmp_path / "m", llama_tensors(), {**LLAMA, "transformers_weights": name}
    )
    says = ("config.json", str(name), "transformers_weights")
    refused(INPUT, "quantize", root, "out", says=says, cwd=tmp_path)


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "stored", "dtype", "says"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "bfloat16", "bfloat16", "says both"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16", "bfloat16", None),
        ({"dtype": None}, "bfloat16", "bfloat16", None),
        ({"dtype": "bf16"}, "bfloat16", "bfloat16", None),
        ({"dtype": "bfloat16"}, "float32", "bfloat16", "the tensors are in float32"),
        ({"dtype": "float32"}, "bfloat16", "float32", "the tensors are in bfloat16"),
    ],
)
def test_a_dtype_in_config_json_is_compared_with_the_tensors(tmp_path, keys, stored, dtype, says):
    config = {k: v for k, v in LLAMA.items() if k != "torch_dtype"} | keys
    tensors = llama_tensors(dtype=getattr(torch, stored))
    out, notes = converted(tmp_path / "m", tensors, config)
    assert any(says in note for note in notes) if says else not notes
    written = json.loads((out / "config.json").read_text())
    assert {k: written[k] for k in keys} == dict.fromkeys(keys, dtype)
    assert read_all(out)[NORM].dtype == getattr(torch, dtype)


def test_a_kept_value_above_the_range_of_the_dtype_is_refused(tmp_path):
    tensors = llama_tensors()
    tensors[NORM][5] = 70000.0
    write_checkpoint_dir(tmp_path / "m", tensors, {**LLAMA, "torch_dtype": "float16"})
    says = (f"{NORM}[5]", "too large for F16", "--dtype")
    refused(INPUT, "quantize", "m", "out", says=says, cwd=tmp_path)


# -- as transformers loads it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        lambda tensors: ({f"_orig_mod.{name}": t for name, t in tensors.items()}, {}),
        lambda tensors: (tensors, {"quantization_config": BNB}),
        lambda tensors: ({n: t.double() for n, t in tensors.items()}, {}),
    ],
    ids=["wrapped", "leftover", "float64"],
)
def test_transformers_loads_every_weight_of_the_output(tmp_path, changed):
    reason = "loading an output needs transformers and bitsandbytes"
    transformers = pytest.importorskip("transformers", reason=reason)
    bnb = pytest.importorskip("bitsandbytes", reason=reason)
    tensors, keys = changed(llama_tensors())
    out, _ = converted(tmp_path / "m", tensors, {**LLAMA, **keys})
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    packed = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(packed) == 14
    assert all(m.weight.quant_state is not None for m in packed)
    assert torch.isfinite(model(input_ids=torch.arange(5)[None]).logits).all()
