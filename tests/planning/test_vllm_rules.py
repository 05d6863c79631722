"""--target vllm: what vLLM would not load, or would decode wrongly, is refused before anything is
written, or mended with a note.

What vLLM does with each was seen by running it; here nf4's answers are checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    USAGE,
    carry_out,
    llama_tensors,
    nf4_ok,
    read_all,
    refused,
    write_checkpoint_dir,
)

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.errors import InputError, UsageError
from nf4cli.format.config import QuantConfig
from nf4cli.planning.answer import Answer
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import Resources
from nf4cli.planning.vllm_rules import require_loadable

STATE = ".quant_state.bitsandbytes__nf4"
VLLM = ("--target", "vllm")
SIXTEEN = "vLLM loads no bitsandbytes checkpoint with experts in 16 bits"


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1).bfloat16()


def mixture(root: Path, width: int = 128, **changed: torch.Tensor) -> Path:
    """A Qwen3-MoE of two layers; `changed` are weights of layer 1, `gate_proj_0` of expert 0."""
    tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp."
        tensors[path + "gate.weight"] = matrix(2, 64)
        for expert in range(2):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (64, width) if name == "down_proj" else (width, 64)
                value = matrix(*shape, seed=10 * expert + layer)
                if layer == 1:
                    value = changed.get(f"{name}_{expert}", value)
                tensors[f"{path}experts.{expert}.{name}.weight"] = value
    return write_checkpoint_dir(root, tensors, {**LLAMA, "model_type": "qwen3_moe"})


def nan(*shape: int) -> torch.Tensor:
    value = matrix(*shape)
    value[3, 5] = torch.nan
    return value


def refusal(source: Path, **options: Any) -> str:
    """What the plan of a conversion for vLLM is refused with."""
    with pytest.raises((InputError, UsageError)) as caught:
        require_loadable(make_plan(open_checkpoint(source), QuantConfig(target="vllm", **options)))
    return str(caught.value)


def test_a_mixture_that_fits_is_written(tmp_path):
    said = nf4_ok("quantize", mixture(tmp_path / "src"), tmp_path / "out", *VLLM)
    assert (
        sum(name.endswith(STATE) for name in read_all(tmp_path / "out") if "experts" in name) == 12
    )
    assert "note" not in said.partition("\n")[0]


def test_fp4_experts(tmp_path):
    """vLLM makes nf4 states of theirs: other weights, and no word of it."""
    source = mixture(tmp_path / "src")
    refused(USAGE, "quantize", source, "out", *VLLM, "--quant-type", "fp4",
            says=("--quant-type fp4", "mlp.experts.0.", "--target unsloth"),
            cwd=tmp_path)  # fmt: skip
    refused(USAGE, "quantize", source, "out", *VLLM, "--quant-type", "fp4", "--plan",
            says=("--quant-type fp4",), cwd=tmp_path)  # fmt: skip
    assert not (tmp_path / "out").exists()
    nf4_ok("quantize", source, tmp_path / "other", "--target", "unsloth", "--quant-type", "fp4")


def test_fp4_without_experts_is_what_vllm_reads(work):
    nf4_ok("quantize", "model", "out", *VLLM, "--quant-type", "fp4", cwd=work)


@pytest.mark.parametrize(
    ("width", "blocksize", "says"),
    [
        (130, 256, "--blocksize 32 or 64 or 128"),  # 8,320 weights
        (33, 128, "--blocksize 32 or 64"),  # 2,112
        (128, 4096, "fits"),
    ],
)
def test_experts_that_end_inside_of_a_block(tmp_path, width, blocksize, says):
    """vLLM joins the scales of all experts: from the first partial block on they would be wrong.

    A stack of experts would have blocks with weights of two.
    """
    source = mixture(tmp_path / "src", width)
    options = (*VLLM, "--blocksize", str(blocksize))
    if says == "fits":
        nf4_ok("quantize", source, tmp_path / "out", *options)
        return
    refused(USAGE, "quantize", source, "out", *options,
            says=(f"{64 * width:,} weights", f"the blocksize {blocksize}", says),
            cwd=tmp_path)  # fmt: skip
    words = says.split()
    nf4_ok("quantize", source, tmp_path / "out", *VLLM, words[0], words[-1])
    stack = (f"{64 * width:,} weights", "experts.gate_up_proj", says)
    refused(USAGE, "quantize", source, "other", "--target", "unsloth", *options[2:],
            says=stack, cwd=tmp_path)  # fmt: skip
    nf4_ok("quantize", source, tmp_path / "other", "--target", "unsloth", words[0], words[-1])


def test_experts_that_no_blocksize_divides(tmp_path):
    """36 x 36 weights of one expert: 1,296 is no multiple of 32."""
    said = refusal(mixture(tmp_path / "src", gate_proj_1=matrix(36, 36)))
    assert "experts.1.gate_proj" in said
    assert "No blocksize divides all experts" in said


@pytest.mark.parametrize("pattern", ["experts", "layers.0.mlp.experts", "*.experts.*", "layers.1"])
def test_experts_kept_by_the_user(tmp_path, pattern):
    """vLLM ignores the skip list for experts, and fails on the first that is no 4-bit weight."""
    source = mixture(tmp_path / "src")
    refused(USAGE, "quantize", source, "out", *VLLM, "--keep", pattern,
            says=("--keep", SIXTEEN, "--target transformers"), cwd=tmp_path)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_an_expert_with_a_nan(tmp_path):
    source = mixture(tmp_path / "src", up_proj_1=nan(128, 64))
    options = ("--on-nonfinite", "keep")
    refused(INPUT, "quantize", source, "out", *VLLM, *options,
            says=("layers.1.mlp.experts.1.up_proj", "NaN", SIXTEEN, "repair the source"),
            cwd=tmp_path)  # fmt: skip
    assert not (tmp_path / "out").exists()
    said = nf4_ok("quantize", source, tmp_path / "unsloth", "--target", "unsloth", *options)
    assert SIXTEEN not in said


def test_experts_in_3d_parameters(tmp_path):
    """gpt-oss and Granite: no loader of 4-bit experts finds any there."""
    for path in ("mlp.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"):
        tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
        for layer in range(2):
            tensors[f"model.layers.{layer}.{path}"] = matrix(4, 64, 256)
        source = write_checkpoint_dir(tmp_path / path, tensors, LLAMA)
        said = refusal(source)
        assert path in said
        assert SIXTEEN in said


def test_experts_of_two_dtypes(tmp_path):
    said = refusal(mixture(tmp_path / "src", up_proj_1=matrix(128, 64).float()))
    assert "experts.1.up_proj.weight is F32" in said
    assert "is BF16" in said


def test_experts_of_a_layer_that_loaders_ignore_do_not_count(tmp_path):
    """DeepSeek's layers beyond num_hidden_layers stay floats, and vLLM does not read them."""
    source = mixture(tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    nf4_ok("quantize", source, tmp_path / "out", *VLLM)


def test_the_default_target_says_that_vllm_does_not_load_it(tmp_path):
    said = nf4_ok("quantize", mixture(tmp_path / "src"), tmp_path / "out").partition("\n")[0]
    assert SIXTEEN in said
    assert "--target vllm" in said
    assert "vLLM" not in nf4_ok("quantize", mixture(tmp_path / "b"), tmp_path / "c",
                                "--target", "unsloth").partition("\n")[0]  # fmt: skip


def test_kept_experts_of_llama4_for_transformers_are_said_not_to_load_in_vllm(tmp_path):
    path = "language_model.model.layers.0.feed_forward."
    tensors = {
        path + "experts.gate_up_proj": matrix(2, 64, 128),
        path + "shared_expert.up_proj.weight": matrix(64, 64),
    }
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config)
    assert SIXTEEN not in nf4_ok("quantize", source, tmp_path / "out")
    assert SIXTEEN in nf4_ok("quantize", source, tmp_path / "kept", "--keep", "experts")


FUSED = {
    "qkv_proj": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "gate_up_proj": ("mlp", ("gate_proj", "up_proj")),
    "fused_qkv_a_proj": ("self_attn", ("q_a_proj", "kv_a_proj_with_mqa")),
    "in_proj_qkvz": ("linear_attn", ("in_proj_qkv", "in_proj_z")),
    "in_proj_ba": ("linear_attn", ("in_proj_b", "in_proj_a")),
}


def with_parts(root: Path, name: str) -> tuple[Path, list[str]]:
    """(a checkpoint that has the parts of a fused module in layer 0, the modules' paths)"""
    where, parts = FUSED[name]
    paths = [f"model.layers.0.{where}.{part}" for part in parts]
    tensors = llama_tensors()
    for path in paths:
        tensors[path + ".weight"] = matrix(64, 64, seed=len(path))
    return write_checkpoint_dir(root, tensors, LLAMA), paths


@pytest.mark.parametrize("name", FUSED)
def test_a_kept_part_of_what_vllm_loads_as_one(tmp_path, name):
    """vLLM would quantize it on the fly, and say nothing."""
    source, paths = with_parts(tmp_path / "src", name)
    refused(USAGE, "quantize", source, "out", *VLLM, "--keep", paths[1],
            says=(f"{paths[1]} stays", f"one {name}", "keep both, or none"),
            cwd=tmp_path)  # fmt: skip
    keep = [word for path in paths for word in ("--keep", path)]
    nf4_ok("quantize", source, tmp_path / "out", *VLLM, *keep)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    skip = config["quantization_config"]["llm_int8_skip_modules"]
    assert f"{paths[0].rpartition('.')[0]}.{name}" in skip
    said = nf4_ok("quantize", source, tmp_path / "other", "--keep", paths[1])
    assert "vLLM" not in said


@pytest.mark.parametrize("name", FUSED)
def test_the_siblings_of_a_part_that_has_to_stay_stay_too(tmp_path, name):
    """Here transformers, when asked, holds one part in float."""
    source, paths = with_parts(tmp_path / "src", name)
    checkpoint = open_checkpoint(source)
    answer = Answer(
        version="5", quantized=frozenset(checkpoint.tensors) - {paths[0] + ".weight"},
        rearranged=frozenset(), modules={},
    )  # fmt: skip
    plan = make_plan(checkpoint, QuantConfig(target="vllm"), lambda _: answer)
    require_loadable(plan)
    rules = {t.name.removesuffix(".weight"): t.rule for t in plan.tensors}
    assert [rules[path] for path in paths] == ["asked", *["fused-with"] * (len(paths) - 1)]
    (note,) = [note for note in plan.notes if "vLLM loads" in note]
    assert all(path in note for path in paths[1:])
    elsewhere = make_plan(checkpoint, QuantConfig(), lambda _: answer)
    assert not any("vLLM" in note for note in elsewhere.notes)


def test_a_float32_model_is_told_the_way_out(tmp_path):
    source = write_checkpoint_dir(
        tmp_path / "src", llama_tensors(dtype=torch.float32), {**LLAMA, "torch_dtype": "float32"}
    )
    said = nf4_ok("quantize", source, tmp_path / "out", *VLLM)
    assert "Convert with --dtype bfloat16" in said.partition("\n")[0]
    mended = nf4_ok("quantize", source, tmp_path / "b", *VLLM, "--dtype", "bfloat16")
    assert "the model is float32" in said.partition("\n")[0]
    assert "does not load" not in said.partition("\n")[0]  # it does: test_vllm.py
    assert "the model is float32" not in mended
    assert "vLLM" not in nf4_ok("quantize", source, tmp_path / "c")


def test_outputs_made_before_these_rules_are_still_proved(tmp_path):
    """A proof plans again by the recipe of the manifest, and does not ask what vLLM loads."""
    source = mixture(tmp_path / "src")
    plan = make_plan(open_checkpoint(source), QuantConfig(target="vllm", quant_type="fp4"))
    carry_out(plan, tmp_path / "out", engines.load("cpu"), Resources(2, 8 << 20, 0))
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)
