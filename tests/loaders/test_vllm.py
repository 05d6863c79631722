"""The real vLLM, on a CPU: the weights that it multiplies by, what it computes, where it fails.

Mixtures load and decode with vLLM's own code. Its kernel for experts wants a GPU: vllm_worker.py
puts plain torch in its place.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import nf4_ok, nightly_but, read_all, same_files, write_checkpoint_dir
from safetensors.torch import load_file, save_file

import nf4cli
from nf4cli.format.config import ModuleFormat, QuantConfig

pytestmark = pytest.mark.loaders

HERE = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("NF4_VLLM_PYTHON") or HERE.parent / ".venv-vllm" / "bin" / "python")
STATE = ".quant_state.bitsandbytes__nf4"
VLLM = ("--target", "vllm")
MATRICES = QuantConfig(target="unsloth", expert_layout="")
"""The recipe of nf4 0.2 for unsloth: it packs any experts as matrices, without vLLM's rules."""
PROMPT = [1, *((i * 37 + 11) % 480 + 3 for i in range(31))]

BASE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**BASE, "head_dim": 64}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, Any] = {
    # Rows that are no whole blocks, a vocabulary that vLLM pads.
    "llama": transformers.LlamaConfig(
        **WIDE | {"vocab_size": 500, "hidden_size": 198, "intermediate_size": 330,
                  "num_attention_heads": 3, "num_key_value_heads": 1},
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
    ),
    "qwen3": transformers.Qwen3Config(**WIDE),
    "gemma3": transformers.Gemma3TextConfig(
        **WIDE | {"num_hidden_layers": 2}, sliding_window=16, query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": transformers.Phi3Config(**BASE),
    "qwen3_moe": transformers.Qwen3MoeConfig(**WIDE, **SPARSE, num_experts=4),
    "mixtral": transformers.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": transformers.DeepseekV3Config(
        **BASE | {"num_hidden_layers": 2, "num_key_value_heads": 4}, **SPARSE,
        n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
        q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, topk_method="noaux_tc",  # which vLLM looks for, as DeepSeek's own files say
    ),
    "qwen3_moe_odd": transformers.Qwen3MoeConfig(
        **WIDE | SPARSE | {"hidden_size": 200, "moe_intermediate_size": 36}, num_experts=4
    ),
    "llama_f16": transformers.LlamaConfig(**WIDE),
    "llama_two_layers": transformers.LlamaConfig(**WIDE | {"num_hidden_layers": 2}),
}  # fmt: skip
FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "qwen3_moe", "mixtral", "deepseek_v3")
MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")


Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Output:
    """An output of nf4: the model that it is made of, and the options, or the recipe."""

    source: str
    options: tuple[str, ...] | QuantConfig

    def make(self, root: Path, place: Path) -> str:
        """Make it of one of the sources in `root`; return what nf4 prints."""
        if isinstance(self.options, QuantConfig):
            nf4cli.quantize(root / self.source, place, self.options)
            return ""
        return nf4_ok("quantize", root / self.source, place, *self.options)


QKV = ("--keep", "layers.0.self_attn.q_proj", "--keep", "layers.0.self_attn.k_proj",
       "--keep", "layers.0.self_attn.v_proj")  # fmt: skip
OUTPUTS = {
    **{family: Output(family, VLLM) for family in FAMILIES},
    "llama_f16": Output("llama_f16", VLLM),
    "from float32": Output("llama_f32", (*VLLM, "--dtype", "bfloat16", "--no-double-quant")),
    "kept by the user": Output("llama_two_layers", (*VLLM, *QKV)),
    "kept for a NaN": Output("llama_nan", (*VLLM, "--on-nonfinite", "keep")),
    "by a recipe": Output(
        "llama_two_layers",
        QuantConfig(
            target="vllm",
            formats=(
                ModuleFormat(32, True, ("q_proj", "0.mlp.down_proj")),
                ModuleFormat(128, False, ("k_proj", "1.mlp.gate_proj")),
            ),
        ),
    ),
    "experts by a recipe": Output(
        "qwen3_moe",
        QuantConfig(
            target="vllm",
            formats=(ModuleFormat(32, False, ("experts",)),),
        ),
    ),
    # What nf4 refuses to write for vLLM, or has a note about.
    "one part kept": Output("llama_two_layers", QKV[:2]),
    "mixture for transformers": Output("qwen3_moe", ()),
    "experts in fp4": Output("qwen3_moe", replace(MATRICES, quant_type="fp4")),
    "experts with partial blocks": Output("qwen3_moe_odd", MATRICES),
    "experts of two dtypes": Output("qwen3_moe_two_dtypes", MATRICES),
    "float32": Output("llama_f32", VLLM),
    "stored as bfloat16": Output("qwen3", ("--quant-storage", "bfloat16")),
}
LOADED = [
    *FAMILIES,
    "by a recipe",
    "experts by a recipe",
    "llama_f16",
    "from float32",
    "float32",
    "kept by the user",
    "kept for a NaN",
]
DENSE = [name for name in FAMILIES if name not in MIXTURES]
UNDER_FLOAT32 = ("llama", "qwen3_moe")
EVERY_COMMIT = (
    "llama",
    "qwen3_moe",
    "by a recipe",
    "experts by a recipe",
    "from float32",
    "one part kept",
    "mixture for transformers",
)
"""Outputs that vLLM loads on every commit, a second or two each; scripts/nightly has the rest."""


def make_model(config: Any, root: Path) -> None:
    """Write a random model: of ones and zeros alone, a lost norm or bias would not show."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    center = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(center if norm else 0.0, 0.05)
    model.to(torch.float16 if root.name.endswith("f16") else torch.bfloat16).save_pretrained(root)


def vary(source: Path, name: str, change: Any, **config: Any) -> None:
    """Write another model beside `source`: its tensors changed."""
    tensors = read_all(source)
    change(tensors)
    known = json.loads((source / "config.json").read_text())
    write_checkpoint_dir(source.parent / name, tensors, known | config)


def make_sources(root: Path) -> None:
    for name, config in CONFIGS.items():
        make_model(config, root / name)

    def to_float32(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.float() for name, tensor in tensors.items()}

    def break_two(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = torch.nan
        tensors["model.layers.0.mlp.up_proj.weight"][7, 1] = torch.inf

    def one_in_float16(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        tensors[name] = tensors[name].half()

    vary(root / "llama_two_layers", "llama_f32", to_float32, dtype="float32")
    vary(root / "llama_two_layers", "llama_nan", break_two)
    vary(root / "qwen3_moe", "qwen3_moe_two_dtypes", one_in_float16)


def as_vllm_reads(output: Path, to: Path) -> Path:
    """Copy an output with the states as vLLM reads them.

    The offset of double quantization is in vLLM's dtype for the model, which is bfloat16 for one in
    float32. What is decoded is in bfloat16, whatever the model's dtype.
    """
    shutil.copytree(output, to)
    (to / "nf4_manifest.json").unlink()
    (file,) = to.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(STATE)]:
        state = json.loads(bytes(tensors[name].numpy()))
        dtype = torch.float16 if state["dtype"] == "float16" else torch.bfloat16
        state["dtype"] = "bfloat16"
        if "nested_offset" in state:
            state["nested_offset"] = float(torch.tensor(state["nested_offset"]).to(dtype))
        tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    return to


@dataclass(frozen=True, slots=True)
class Seen:
    """What nf4 printed, and what vllm_worker.py wrote down, by name of OUTPUTS.

    Attributes:
        root: has the folders sources, outputs, decoded, rounded, decoded-rounded, and vllm with
            the worker's files: of outputs, and of sources as `NAME source`.
    """

    root: Path
    printed: dict[str, str]

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / "vllm" / f"{name}.json").read_text())

    def loaded(self, name: str) -> dict[str, Any]:
        """The report of what has to be loaded without an error."""
        report = self.report(name)
        assert "error" not in report, report
        return report

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / "vllm" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Seen:
    if not PYTHON.exists():
        pytest.skip(
            "no environment with vLLM: scripts/test makes one, where the disk has 8 GB left, and "
            "not for --quick; NF4_VLLM_PYTHON names another"
        )
    root = tmp_path_factory.mktemp("vllm")
    make_sources(root / "sources")
    names = list(OUTPUTS) if pytestconfig.getoption("--long") else EVERY_COMMIT
    printed, jobs = {}, []
    for name in names:
        output = OUTPUTS[name]
        place = root / "outputs" / name
        printed[name] = output.make(root / "sources", place)
        nf4_ok("dequantize", place, root / "decoded" / name)
        rounded = as_vllm_reads(place, root / "rounded" / name)
        nf4_ok("dequantize", rounded, root / "decoded-rounded" / name)
        jobs.append({"name": name, "model": str(place)})
    jobs += [
        {"name": f"{name} under float32", "model": str(root / "outputs" / name), "float32": True}
        for name in UNDER_FLOAT32
        if name in names
    ]
    jobs += [
        {"name": f"{name} source", "model": str(root / "sources" / name)}
        for name in FAMILIES if name in names
    ]  # fmt: skip
    if "float32" in names:
        float32 = {"model": str(root / "outputs" / "float32"), "dtype": "float32"}
        jobs.append({"name": "computing in float32", **float32})
    no_plugin = {"VLLM_PLUGINS": ""}
    jobs.append({**jobs[0], "name": "without the plugin", "environment": no_plugin})
    (root / "vllm").mkdir()
    (root / "jobs.json").write_text(json.dumps({"prompt": PROMPT, "models": jobs}))
    done = subprocess.run(
        [PYTHON, HERE / "vllm_worker.py", root / "jobs.json", root / "vllm"],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "VLLM_CACHE_ROOT": str(root / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Seen(root, printed)


EXPERTS = {"w13_weight": (("gate_proj", "up_proj"), ("w1", "w3")),
           "w2_weight": (("down_proj",), ("w2",))}  # fmt: skip
"""What vLLM calls the experts of a layer -> the weights of one expert, in both ways of naming."""
HALVES_OF_KV_B = ("W_UK_T", "W_UV")
"""What vLLM makes of DeepSeek's kv_b_proj beside it, to multiply in another order."""


def parts_of(name: str, fused: dict[str, list[str]], stored: dict[str, Any]) -> list[list[str]]:
    """Return the stored weights that a weight of vLLM consists of; a list for each expert."""
    if name in stored:
        return [[name]]
    path, _, leaf = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    if leaf in HALVES_OF_KV_B:
        return [[f"{path.partition('.mla_attn')[0]}.kv_b_proj.weight"]]
    if leaf not in EXPERTS:
        return [[f"{parent}.{part}.{leaf}" for part in fused[last]]]
    layer = f"{path.partition('.experts')[0]}.experts"
    (parts,) = (p for p in EXPERTS[leaf] if f"{layer}.0.{p[0]}.weight" in stored)
    return [[f"{layer}.{e}.{part}.weight" for part in parts] for e in range(4)]


def joined(name: str, parts: list[list[str]], stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what vLLM has to hold under a name: the parts one under the other, or in a stack."""
    experts = [torch.cat([stored[part] for part in expert]) for expert in parts]
    weight = torch.stack(experts) if experts[1:] else experts[0]
    if name.endswith(HALVES_OF_KV_B):
        heads = CONFIGS["deepseek_v3"].num_attention_heads
        keys, values = weight.reshape(heads, -1, weight.shape[1]).chunk(2, dim=1)
        return keys if name.endswith("W_UK_T") else values.transpose(1, 2)
    return weight


def pairs_of(seen: Seen, name: str, stored: dict[str, torch.Tensor], job: str = "") -> Pairs:
    """Return (vLLM's weight, the stored one) by vLLM's name for it, in vLLM's shape and dtype.

    Every weight of vLLM and every stored one is in a pair.

    Args:
        job: where it is not the output's own.
    """
    report, weights = seen.loaded(job or name), seen.weights(job or name)
    pairs, used = {}, set()
    for path, weight in weights.items():
        parts = parts_of(path, report["fused"], stored)
        used |= {part for expert in parts for part in expert}
        expected = joined(path, parts, stored)
        if path in report["packed"]:
            expected = expected.bfloat16()  # in which vLLM multiplies, whatever the model's dtype
        held, rows = weight, expected.shape[0]
        if path.endswith(("embed_tokens.weight", "lm_head.weight")):
            held = weight[:rows]
            assert not weight[rows:].any(), "vLLM pads the vocabulary with zeros"
        if not expected.isfinite().all():  # a row of an identity has zeros: 0 x NaN is a NaN
            unit = torch.eye(expected.shape[1], dtype=expected.dtype)
            expected = (unit @ expected.T).T
        assert held.shape == expected.shape, path
        pairs[path] = (held, expected.to(held.dtype))
    assert used == stored.keys()
    return pairs


def largest_difference(pairs: Pairs) -> float:
    return max(float((a.float() - b.float()).abs().nan_to_num().max()) for a, b in pairs.values())


def unequal(pairs: Pairs) -> list[str]:
    return [path for path, (a, b) in pairs.items()
            if not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)]  # fmt: skip


def decoded(seen: Seen, name: str, folder: str = "decoded") -> dict[str, torch.Tensor]:
    return read_all(seen.root / folder / name)


@pytest.mark.parametrize("name", nightly_but(EVERY_COMMIT, LOADED))
def test_every_weight_is_what_nf4_dequantize_gives(seen, name):
    """But for the offset of double quantization, which vLLM rounds to its dtype for the model."""
    exact = pairs_of(seen, name, decoded(seen, name, "decoded-rounded"))
    assert unequal(exact) == []
    packed = {key.removesuffix(".absmax") for key in read_all(seen.root / "outputs" / name)
              if key.endswith(".absmax")}  # fmt: skip
    report, stored = seen.loaded(name), decoded(seen, name)
    parts = [parts_of(path, report["fused"], stored) for path in report["packed"]]
    assert {part for p in parts for expert in p for part in expert} == packed
    assert largest_difference(pairs_of(seen, name, stored)) <= 2**-10


def test_without_double_quantization_there_is_no_difference(seen):
    name = "from float32"
    assert "--no-double-quant" in OUTPUTS[name].options
    assert unequal(pairs_of(seen, name, decoded(seen, name))) == []
    assert unequal(pairs_of(seen, "llama", decoded(seen, "llama"))) != []


@pytest.mark.parametrize("name", UNDER_FLOAT32)
def test_the_rounded_offset_is_all_the_difference(seen, name):
    assert unequal(pairs_of(seen, name, decoded(seen, name), f"{name} under float32")) == []


@cache
def expected_logprobs(model: Path) -> torch.Tensor:
    """What transformers computes in float32."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return found[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])]


def rms(values: torch.Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", nightly_but(EVERY_COMMIT, FAMILIES))
def test_it_computes_what_transformers_does(seen, name):
    """As nearly as vLLM does with the unquantized model, in bfloat16.

    Three times that: bitsandbytes rounds the offset and the results of each part to bfloat16.
    """
    source, model = seen.root / "sources" / name, seen.root / "decoded" / name
    plain = torch.tensor(seen.loaded(f"{name} source")["logprobs"]) - expected_logprobs(source)
    ours = torch.tensor(seen.loaded(name)["logprobs"]) - expected_logprobs(model)
    print(f"{name}: {plain.abs().max():.3f} unquantized, {ours.abs().max():.3f} quantized")
    assert rms(ours) <= 3 * rms(plain)
    # What the bound has to tell from ours: another model, here the unquantized one.
    assert rms(ours) < rms(expected_logprobs(model) - expected_logprobs(source)) / 3


@pytest.mark.parametrize("name", nightly_but(EVERY_COMMIT, ["kept by the user", "kept for a NaN"]))
def test_kept_parts_of_what_vllm_loads_as_one_are_not_quantized(seen, name):
    """Of layer 0; the first test says that the others are as packed, and kept ones exact."""
    packed = seen.loaded(name)["packed"]
    kept = {"qkv_proj", "gate_up_proj"} if "NaN" in name else {"qkv_proj"}
    layers = [[path.split(".")[4] for path in packed if f"layers.{n}." in path] for n in (0, 1)]
    assert sorted(layers[1]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert set(layers[0]) == set(layers[1]) - kept
    assert ("model.layers.0.self_attn.k_proj.weight" in seen.printed[name]) == ("NaN" in name)


def test_one_kept_part_is_quantized_on_the_fly(seen):
    """Which --target vllm refuses, and the default target cannot know."""
    name = "one part kept"
    pairs = pairs_of(seen, name, decoded(seen, name, "decoded-rounded"))
    path = "model.layers.0.self_attn.qkv_proj.weight"
    assert unequal(pairs) == [path]
    rows = BASE["num_attention_heads"] * WIDE["head_dim"]
    ours, expected = pairs[path]
    assert torch.equal(ours[rows:], expected[rows:])
    assert (ours[:rows].float() - expected[:rows].float()).abs().max() > 2**-7


@pytest.mark.parametrize(
    ("name", "error", "where"),
    [
        ("mixture for transformers", "doesn't match the broadcast shape", "_load_w2"),
        pytest.param(
            "experts of two dtypes",
            "AssertionError",
            "_fuse_moe_quant_states",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "stored as bfloat16",
            "Unsupported bnb_4bit_quant_storage: bfloat16",
            "",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "computing in float32", "AssertionError", "_assert_and_load", marks=pytest.mark.long
        ),
        ("without the plugin", "Unknown quantization method: bitsandbytes", ""),
    ],
)
def test_what_nf4_says_to_fail_in_vllm_does(seen, name, error, where):
    report = seen.report(name)
    assert error in report.get("error", ""), report
    assert where in report["at"][-1]


def test_a_note_says_that_the_mixture_for_transformers_does_not_load(seen):
    assert "so it does not load this output" in seen.printed["mixture for transformers"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "at_least"), [("experts in fp4", 0.2), ("experts with partial blocks", 0.05)]
)
def test_experts_that_nf4_refuses_for_vllm_are_wrong_there(seen, name, at_least):
    """Without a word: it loads, runs, and has other weights."""
    pairs = pairs_of(seen, name, decoded(seen, name, "decoded-rounded"))
    # More than bitsandbytes' CPU kernel differs by for FP4, whose table has other last digits.
    wrong = [path for path, pair in pairs.items() if largest_difference({path: pair}) > at_least]
    assert [path.rpartition(".")[2] for path in wrong] == list(EXPERTS)


@pytest.mark.parametrize(
    "name", nightly_but(EVERY_COMMIT, (n for n in FAMILIES if n not in MIXTURES))
)
def test_a_dense_model_is_the_same_for_every_target(seen, name, tmp_path):
    """So what vLLM was seen to load above is what the default target writes, too."""
    for target in ("transformers", "unsloth"):
        nf4_ok("quantize", seen.root / "sources" / name, tmp_path / target, "--target", target)
        ours = seen.root / "outputs" / name
        assert same_files(tmp_path / target, ours, but=("README.md", "nf4_manifest.json"))


def test_the_printed_line_and_the_card_say_what_was_run(seen):
    installed = json.loads((seen.root / "vllm" / "installed.json").read_text())
    assert installed["vllm"] == "0.32.0"
    assert installed["vllm-bnb-plugin"] == "0.0.3"
    # Why the plugin is installed with --no-deps: it asks for vLLM's build for CUDA.
    assert "vllm" in installed["the plugin asks for"]
    place = seen.root / "outputs" / "llama"
    (line,) = re.findall(r"^load    (.*)$", seen.printed["llama"], re.M)
    assert shlex.split(line, comments=True) == ["vllm", "serve", str(place)]
    assert line.endswith("pip install --no-deps vllm-bnb-plugin")
    assert "\npip install --no-deps vllm-bnb-plugin " in (place / "README.md").read_text()
