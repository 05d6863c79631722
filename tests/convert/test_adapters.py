"""PEFT adapters merged in the streaming pass, compared with PEFT's own merge_and_unload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float8_models import CASES, float8_model
from helpers import LLAMA as HELPERS_LLAMA
from helpers import nf4, nf4_ok, read_all, same_files, write_checkpoint_dir
from safetensors.torch import load_file, save_file

import nf4cli

peft = pytest.importorskip("peft", reason="adapters are made with PEFT (the test extra has it)")
transformers = pytest.importorskip("transformers", reason="and with transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LLAMA = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "attention_bias": True, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 9, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj", "up_proj"]},
    "bias_all": {"r": 2, "bias": "all", "target_modules": ["k_proj"]},
    "bias_lora_only": {"r": 2, "bias": "lora_only", "target_modules": ["k_proj"]},
    "lora_bias": {"r": 2, "lora_bias": True, "target_modules": ["v_proj"]},
    "modules_to_save": {
        "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "patterns": {
        "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, r"k_pr.*": 5},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 31, "q_proj": 2},
    },
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
}  # fmt: skip


def base_of(place: Path, family: str = "llama") -> Path:
    """Write a tiny model in bfloat16, and return its directory."""
    torch.manual_seed(1)
    if family == "gpt2":
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    for parameter in model.parameters():  # biases are zeros at first
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(place)
    return place


def adapter_of(base: Path, place: Path, seed: int = 5, **options: Any) -> Path:
    """Write an adapter with random weights, and return its directory."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(place)
    return place


def merged_by_peft(base: Path, place: Path, *adapters: Path) -> Path:
    """Write the float32 model that PEFT merges, and return its directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_of(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def plain(base):
    return adapter_of(base, base.parent / "plain", **VARIANTS["plain"])


@pytest.fixture(scope="module")
def quantized(base, plain):
    nf4_ok("quantize", base, base.parent / "plain-nf4", "--adapter", plain)
    return base.parent / "plain-nf4"


def error_of(*arguments: object) -> str:
    """Run a command that has to refuse, and return what it says."""
    done = nf4(*arguments)
    assert done.returncode in (2, 3), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.rpartition("error: ")[2]


def require_merged(base: Path, work: Path, *adapters: Path, first: str = "layers.0") -> None:
    """Quantize with adapters, and compare with what PEFT merges, quantized."""
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    nf4_ok("quantize", base, work / "ours", *options)
    merged = merged_by_peft(base, work / "merged", *adapters)
    nf4_ok("quantize", merged, work / "theirs", "--dtype", "bfloat16")
    ours, theirs = read_all(work / "ours"), read_all(work / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-5)
        elif name.endswith(".weight"):  # a value at the boundary of two codes
            high, low = tensor >> 4, theirs[name] >> 4
            assert (high != low).float().mean() < 2e-3, name
    exact = read_all(merged)
    nf4_ok("quantize", base, work / "kept", *options, "--keep", first, "--dtype", "float32")
    kept = read_all(work / "kept")
    floats = [n for n in exact if n in kept and kept[n].dtype == torch.float32]
    assert any(".0." in name for name in floats)
    for name in floats:
        torch.testing.assert_close(kept[name], exact[name], rtol=1e-5, atol=1e-6)
    nf4_ok("verify", work / "ours", "--source", base, *options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_merged_as_peft_merges_it(base, work, variant):
    require_merged(base, work, adapter_of(base, work / "adapter", **VARIANTS[variant]))


@pytest.mark.parametrize("dora", [False, True])
def test_a_conv1d_is_merged_as_it_lies(work, dora):
    base = base_of(work / "base", "gpt2")
    options = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    adapter = adapter_of(base, work / "adapter", use_dora=dora, **options)
    if not dora:
        require_merged(base, work, adapter, first="h.0")
        return
    nf4_ok("quantize", base, work / "ours", "--adapter", adapter)
    merged = merged_by_peft(base, work / "merged", adapter)
    nf4_ok("quantize", merged, work / "theirs", "--dtype", "bfloat16")
    for name, tensor in read_all(work / "ours").items():
        if name.endswith("c_fc.weight"):
            theirs = read_all(work / "theirs")[name]
            assert (tensor != theirs).float().mean() < 2e-3
    error = error_of("quantize", base, work / "kept", "--adapter", adapter, "--keep", "*.c_fc")
    assert "DoRA" in error


def test_several_adapters_are_added_in_order(base, plain, work):
    other = adapter_of(base, work / "second", 8, **VARIANTS["dora"])
    require_merged(base, work, plain, other)


def test_a_scale_is_a_factor_of_the_product(base, plain, work):
    half = work / "halved"
    shutil.copytree(plain, half)
    tensors = load_file(plain / WEIGHTS)
    halved = {n: t / 2 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(halved, half / WEIGHTS)
    nf4_ok("quantize", base, work / "a", "--adapter", plain, "--adapter-scale", "0.5")
    nf4_ok("quantize", base, work / "b", "--adapter", half)
    assert same_files(work / "a", work / "b", but=("nf4_manifest.json", "README.md"))
    nf4_ok("verify", work / "a", "--source", base, "--adapter", plain)


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_bytes_do_not_depend_on_the_machine(base, plain, work, scale):
    dora = adapter_of(base, work / "dora", **VARIANTS["dora"])
    options = ("--adapter", plain, "--adapter", dora, "--scale", scale)
    nf4_ok("quantize", base, work / "one", *options, "--workers", 1)
    for name, more in {
        "two": ("--workers", 2), "torch": ("--engine", "torch"), "small": ("--memory", "90MB"),
    }.items():  # fmt: skip
        nf4_ok("quantize", base, work / name, *options, *more)
        assert same_files(work / "one", work / name)


def test_a_row_of_a_dora_may_lie_in_two_chunks(work):
    torch.manual_seed(1)
    sizes = {"hidden_size": 328, "intermediate_size": 520, "num_hidden_layers": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | sizes)).to(
        torch.bfloat16
    ).save_pretrained(work / "base")
    options = {"use_dora": True, "target_modules": ["down_proj", "q_proj", "up_proj"]}
    first = adapter_of(work / "base", work / "first", r=3, **options)
    second = adapter_of(work / "base", work / "second", 9, r=2, **options)
    for name, *more in (("large",), ("small", "--memory", "81MB", "--workers", 1)):
        nf4_ok("quantize", work / "base", work / name, "--adapter", first, "--adapter", second,
               *more)  # fmt: skip
    assert same_files(work / "large", work / "small")
    merged = merged_by_peft(work / "base", work / "merged", first, second)
    nf4_ok("quantize", merged, work / "theirs", "--dtype", "bfloat16")
    theirs = read_all(work / "theirs")
    for name, tensor in read_all(work / "small").items():
        if name.endswith("_proj.weight"):
            assert (tensor != theirs[name]).float().mean() < 2e-3, name
    nf4_ok("dequantize", work / "small", work / "a", "--adapter", first)
    nf4_ok("dequantize", work / "small", work / "b", "--adapter", first, "--memory", "81MB",
           "--workers", 1)  # fmt: skip
    assert same_files(work / "a", work / "b")


@pytest.mark.parametrize("shape", [(9, 70, 5, 0), (9, 64, 16, 13), (1, 33, 3, 5), (40, 16, 64, 3)])
def test_engines_add_a_product_in_the_same_order(all_engines, shape):
    rows, columns, rank, first = shape
    random = np.random.default_rng(0)
    left = random.standard_normal((rows, rank), np.float32)
    right = random.standard_normal((rank, columns), np.float32)
    values = random.standard_normal(rows * columns - first, np.float32)
    expected = values.copy()
    total = np.zeros((rows, columns), np.float32)
    for k in range(rank):
        total += left[:, k : k + 1] * right[k]
    expected += np.float32(0.3) * total.reshape(-1)[first:]
    for engine in all_engines.values():
        out = values.copy()
        engine.add_product(out, first, left, right, 0.3)
        assert (out.view(np.uint32) == expected.view(np.uint32)).all(), engine.name
    matrix = random.standard_normal((rows, columns), np.float32)
    sums = [engine.square_sums(matrix).tolist() for engine in all_engines.values()]
    assert all(found == sums[0] for found in sums)
    assert sums[0] == pytest.approx((matrix.astype(np.float64) ** 2).sum(1).tolist())


@pytest.mark.parametrize("variant", ["plain", "dora", "modules_to_save", "embedding", "lora_bias"])
def test_dequantize_merges_into_the_decoded_weights(base, work, variant):
    adapter = adapter_of(base, work / "adapter", **VARIANTS[variant])
    nf4_ok("quantize", base, work / "four")
    nf4_ok("dequantize", work / "four", work / "decoded", "--dtype", "float32")
    nf4_ok("dequantize", work / "four", work / "ours", "--dtype", "float32", "--adapter", adapter)
    theirs = read_all(merged_by_peft(work / "decoded", work / "merged", adapter))
    ours = read_all(work / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    nf4cli.dequantize(work / "four", work / "auto", adapters=[adapter])
    for name, tensor in read_all(work / "auto").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, ours[name].bfloat16())
    nf4_ok("dequantize", work / "four", work / "torch", "--adapter", adapter, "--engine", "torch")
    assert same_files(work / "auto", work / "torch")


def test_the_manifest_names_the_adapter_and_verify_needs_it(base, plain, quantized, work):
    recipe = json.loads((quantized / "nf4_manifest.json").read_text())["recipe"]
    (entry,) = recipe["adapters"]
    assert entry["name"] == "plain"
    assert entry["scale"] == 1.0
    assert set(entry) == {"name", "config", "weights", "scale"}
    nf4_ok("verify", quantized)
    assert nf4cli.verify(quantized, base, adapters=[plain]).ok
    nf4_ok("verify", quantized, "--source", base, "--adapter", plain, "--sample", "50%")
    assert "1 adapter" in error_of("verify", quantized, "--source", base)
    other = adapter_of(base, work / "other", 77, **VARIANTS["plain"])
    assert "not the adapter" in error_of("verify", quantized, "--source", base, "--adapter", other)
    nf4_ok("quantize", base, work / "without")
    error = error_of("verify", work / "without", "--source", base, "--adapter", plain)
    assert "leave --adapter out" in error
    assert not same_files(quantized, work / "without")


def test_a_changed_byte_is_found(base, plain, quantized, work):
    shutil.copytree(quantized, work / "out")
    path = work / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    done = nf4("verify", work / "out", "--source", base, "--adapter", plain)
    assert done.returncode == 1


def test_a_prefix_of_the_adapter_or_the_model_is_bridged(base, plain, work, quantized):
    tensors = load_file(plain / WEIGHTS)
    old = {  # as files of PEFT before 0.3 spell them; trained on the model without its head
        n.replace("base_model.model.model.", "base_model.model.")
        .replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t
        for n, t in tensors.items()
    }  # fmt: skip
    shutil.copytree(plain, work / "old")
    save_file(old, work / "old" / WEIGHTS)
    nf4_ok("quantize", base, work / "out", "--adapter", work / "old")
    assert same_files(quantized, work / "out", but=("nf4_manifest.json", "README.md"))


def broken(plain: Path, place: Path, tensors: Any = None, **config: Any) -> Path:
    """Return a copy of an adapter with other tensors, or another configuration."""
    shutil.copytree(plain, place)
    if tensors is not None:
        save_file(tensors(load_file(plain / WEIGHTS)), place / WEIGHTS)
    stated = json.loads((plain / CONFIG).read_text()) | config
    (place / CONFIG).write_text(json.dumps(stated))
    return place


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "missing B": (lambda t: {n: v for n, v in t.items() if n != f"{Q}.lora_B.weight"}, "no lora_B"),
    "NaN": (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] * torch.nan}, "NaN"),
    "two names": (lambda t: t | {f"{Q}.lora_A.default.weight": torch.ones(4, 64)}, "same tensor"),
    "another hidden size": (
        lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 80)}, "[64, 80]",
    ),
    "another rank": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(5, 64)}, "rank 4"),
    "unknown module": (
        lambda t: {n.replace("q_proj", "query"): v for n, v in t.items()}, "does not have",
    ),
    "unknown whole": (lambda t: t | {f"{Q}.strange": torch.ones(4)}, "fits no weight"),
    "a convolution": (
        lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 64, 1, 1)}, "convolution",
    ),
    "integers": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 64).int()}, "I32"),
    "too large": (lambda t: {n: v + 3e38 for n, v in t.items()}, "not finite"),
    "a stray magnitude": (
        lambda t: t | {f"{Q}.lora_magnitude_vector.weight": torch.ones(64)}, "use_dora",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors_are_refused(base, plain, work, what):
    change, message = BAD_TENSORS[what]
    adapter = broken(plain, work / "bad", change)
    assert message in error_of("quantize", base, work / "out", "--adapter", adapter)
    assert not (work / "out").exists()


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "LORA only"),
    "no method": ({"peft_type": None}, "LORA only"),
    "rank 0": ({"r": 0}, "from 1 to"),
    "huge rank": ({"r": 10**9}, "from 1 to"),
    "alpha": ({"lora_alpha": "a"}, "expected a number"),
    "pissa": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "experts": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "slow pattern": ({"rank_pattern": {"(a+)+": 4}}, "for ever"),
    "no pattern": ({"alpha_pattern": {"(": 4}}, "no pattern"),
    "a list": ({"rank_pattern": [1]}, "expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configurations_are_refused(base, plain, work, what):
    change, message = BAD_CONFIGS[what]
    adapter = broken(plain, work / "bad", **change)
    assert message in error_of("quantize", base, work / "out", "--adapter", adapter)
    assert not (work / "out").exists()


def test_bad_files_are_refused(base, plain, work):
    pickled = broken(plain, work / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    cut = broken(plain, work / "cut")
    (cut / WEIGHTS).write_bytes((plain / WEIGHTS).read_bytes()[:-10])
    linked = broken(plain, work / "linked")
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(plain / WEIGHTS)
    empty = work / "empty"
    empty.mkdir()
    for adapter, message in (
        (pickled, "save_pretrained"), (cut, "cut/adapter_model"), (linked, "a file outside"),
        (empty, "no adapter_config.json"), (work / "nowhere", "no directory"),
    ):  # fmt: skip
        assert message in error_of("quantize", base, work / "out", "--adapter", adapter)


def test_options_that_do_not_go_together_are_refused(base, plain, work):
    whole = adapter_of(base, work / "whole", **VARIANTS["modules_to_save"])
    for options, message in (
        (("--adapter-scale", "2"), "needs --adapter"),
        (("--adapter", plain, "--adapter-scale", "1", "--adapter-scale", "2"), "2 times"),
        (("--adapter", plain, "--adapter-scale", "nan"), "out of range"),
        (("--adapter", whole, "--adapter-scale", "2"), "a whole tensor has no scale"),
        (("--adapter", whole, "--adapter", whole), "both change"),
    ):
        assert message in error_of("quantize", base, work / "out", *options)
    assert "needs --source" in error_of("verify", base, "--adapter", plain)


def test_a_tied_embedding_is_not_changed(work):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "base")
    adapter = adapter_of(work / "base", work / "a", r=2, target_modules=["embed_tokens"])
    assert "tied" in error_of("quantize", work / "base", work / "out", "--adapter", adapter)


def test_another_base_is_a_note(base, plain, work):
    adapter = broken(plain, work / "a", base_model_name_or_path="org/other", revision="v9")
    done = nf4("quantize", base, work / "out", "--adapter", adapter)
    assert done.returncode == 0
    assert "'org/other'" in done.stdout
    assert "'v9'" in done.stdout


def test_a_run_is_resumed_with_the_same_adapter_only(base, plain, quantized, work):
    from nf4cli.checkpoint.adapter_files import read_adapter
    from nf4cli.checkpoint.discovery import open_checkpoint
    from nf4cli.convert.resume import header
    from nf4cli.format.config import QuantConfig
    from nf4cli.planning.make_plan import make_plan

    def told(*adapters: Path) -> Any:
        merging = [read_adapter(adapter, adapter.name) for adapter in adapters]
        plan = make_plan(open_checkpoint(base), QuantConfig(), merging=merging)
        return header({"": plan}, "blake3")

    other = adapter_of(base, work / "plain", 77, **VARIANTS["plain"])
    assert told(plain) == told(plain)
    assert told(plain) != told(other)
    assert told(plain) != told()


@pytest.mark.parametrize("form", ["deepseek", "per channel", "per tensor"])
def test_the_base_may_be_stored_in_float8(work, form):
    """The merge is that into the weights which the float8 ones decode to."""
    decoded = float8_model(work / "float8", *CASES[form])
    write_checkpoint_dir(work / "decoded", decoded, HELPERS_LLAMA)
    adapter = adapter_of(work / "decoded", work / "adapter")
    for name in ("float8", "decoded"):
        nf4_ok("quantize", work / name, work / f"{name}-nf4", "--adapter", adapter, "-q")
    ours, expected = read_all(work / "float8-nf4"), read_all(work / "decoded-nf4")
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    nf4_ok("verify", work / "float8-nf4", "--source", work / "float8", "--adapter", adapter)


def test_a_weight_with_a_nan_is_kept_with_the_adapter_merged(base, work):
    broken = shutil.copytree(base, work / "broken")
    (file,) = broken.glob("*.safetensors")
    tensors = read_all(broken)
    name = next(n for n in tensors if n.endswith("layers.0.self_attn.q_proj.weight"))
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    adapter = adapter_of(base, work / "adapter")
    options = ("--on-nonfinite", "keep", "--adapter", adapter)
    nf4_ok("quantize", broken, work / "out", *options, "-q")
    kept = read_all(work / "out")[name].float()
    assert kept.shape == tensors[name].shape
    assert torch.isnan(kept[3, 5])
    changed = kept[0] != tensors[name][0].to(kept.dtype)
    assert changed.any(), "the adapter is not in the kept weight"
    nf4_ok("verify", work / "out", "--source", broken, "--adapter", adapter)
