"""Families whose 4-bit layout is not their source's: quantize, dequantize, and load again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import text_models
import torch
from elsewhere import Elsewhere
from helpers import INPUT, LLAMA, nf4_ok, read_all, refused, same_files, write_checkpoint_dir
from safetensors.torch import save_file
from tiny_models import MIXTURES, MODELS, SPECIAL, UNTIED, VISION, WIDE_HEADS, Tiny, V

from nf4cli import engines
from nf4cli.convert.dequantize import plan_decoding, write_decoded
from nf4cli.errors import InputError
from nf4cli.planning.resources import Resources
from nf4cli.planning.weights import regions

H = 64
FOUR = {"n_layer": 2, "n_head": 4, "n_embd": H}

FAMILIES: dict[str, tuple[Tiny, tuple[str, ...]]] = {
    "llama4_text": (MODELS["llama4_text"], ()),
    "llama4_text_vllm": (MODELS["llama4_text"], ("--target", "vllm")),
    "llama4": (
        Tiny(
            "Llama4Config", "Llama4ForConditionalGeneration",
            {
                "text_config": {
                    **WIDE_HEADS, **UNTIED, "intermediate_size_mlp": 128, "num_local_experts": 4,
                    "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
                },
                "vision_config": {
                    **VISION, "vision_output_dim": H, "projector_input_dim": H,
                    "projector_output_dim": H,
                },
            },
        ),
        (),
    ),
    "mixtral": (MODELS["mixtral"], ("--target", "vllm")),
    "qwen3_moe": (MODELS["qwen3_moe"], ("--target", "vllm")),
    "mixtral_unsloth": (MODELS["mixtral"], ("--target", "unsloth")),
    "qwen3_moe_unsloth": (MODELS["qwen3_moe"], ("--target", "unsloth")),
    "deepseek_v3_unsloth": (MODELS["deepseek_v3"], ("--target", "unsloth")),
    **{f"{name}_unsloth": (tiny, ("--target", "unsloth")) for name, tiny in MIXTURES.items()},
    "gpt2": (MODELS["gpt2"], ()),
    "openai-gpt": (
        Tiny("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {**FOUR, "vocab_size": V, **SPECIAL}), (),
    ),
    "imagegpt": (
        Tiny("ImageGPTConfig", "ImageGPTForCausalImageModeling", {**FOUR, "vocab_size": V}), (),
    ),
    "decision_transformer": (
        Tiny(
            "DecisionTransformerConfig", "DecisionTransformerModel",
            {**FOUR, "hidden_size": H, "vocab_size": 1, **SPECIAL},
        ),
        (),
    ),
    "clvp_decoder": (
        Tiny(
            "ClvpDecoderConfig", "ClvpForCausalLM",
            {
                "hidden_size": H, "n_inner": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "vocab_size": V, "num_mel_attn_blocks": 1, "max_text_tokens": 32,
                "max_position_embeddings": 64,
            },
        ),
        (),
    ),
    "qwen2_vl": (MODELS["qwen2_vl"], ()),
}  # fmt: skip


def saved(tiny: Tiny, root: Path) -> Any:
    """A random model in bfloat16, saved by transformers; returns its class."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, tiny.config)(**tiny.arguments)
    model_class = getattr(transformers, tiny.model)
    model_class(config).to(torch.bfloat16).save_pretrained(root)
    return model_class


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The root mean square error of b against a, as a part of a's."""
    return float((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-12))


@pytest.mark.loaders
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoded_model_is_its_source_again(tmp_path, name):
    os.environ["HF_HUB_OFFLINE"] = "1"
    tiny, options = FAMILIES[name]
    source, out, back = (tmp_path / part for part in ("src", "out", "back"))
    model_class = saved(tiny, source)
    nf4_ok("quantize", source, out, "-q", *options)
    nf4_ok("dequantize", out, back)
    given, found = read_all(source), read_all(back)
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
        k: (t.shape, t.dtype) for k, t in given.items()
    }
    changed = [k for k in given if not torch.equal(given[k], found[k])]
    assert changed
    assert {k: far(given[k], found[k]) for k in changed if far(given[k], found[k]) > 0.12} == {}
    loaded, info = model_class.from_pretrained(back, output_loading_info=True)
    assert not any(info[f"{key}_keys"] for key in ("missing", "unexpected", "mismatched"))
    state = model_class.from_pretrained(source).state_dict()
    assert all(far(state[k], t) < 0.12 for k, t in loaded.state_dict().items() if k in state)


@pytest.mark.loaders
@pytest.mark.parametrize("name", [n for n, (_, options) in FAMILIES.items() if not options])
def test_a_4bit_model_has_the_weights_of_its_source(tmp_path, name):
    """As the loader holds them: a layer that is taken for another, or transposed, is far off."""
    import bitsandbytes as bnb

    os.environ["HF_HUB_OFFLINE"] = "1"
    source, out = tmp_path / "src", tmp_path / "out"
    model_class = saved(FAMILIES[name][0], source)
    nf4_ok("quantize", source, out, "-q")
    loaded, info = model_class.from_pretrained(out, output_loading_info=True)
    assert not any(info[f"{key}_keys"] for key in ("missing", "unexpected", "mismatched"))
    modules = dict(model_class.from_pretrained(source).named_modules())
    compared = 0
    for path, module in loaded.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit) or path not in modules:
            continue  # SequentialLlama4TextExperts has modules that the source's model has not
        weight = modules[path].weight
        if type(modules[path]).__name__ == "Conv1D":
            weight = weight.T
        with torch.compiler.set_stance("force_eager"):
            decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert decoded.shape == (module.out_features, module.in_features) == weight.shape, path
        assert far(weight, decoded) < 0.12, path
        compared += 1
    assert compared


# -- Llama 4's fused experts, by hand -----------------------------------------------------------

PATH = "model.layers.0.feed_forward.experts"
EXPERTS, WIDTH = 3, 40
LLAMA4 = {
    **LLAMA, "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"],
    "num_hidden_layers": 1, "num_local_experts": EXPERTS,
}  # fmt: skip


def llama4(root: Path, dtype: torch.dtype = torch.bfloat16, hidden: int = H) -> Path:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    tensors = {
        f"{PATH}.gate_up_proj": values(EXPERTS, hidden, 2 * WIDTH),
        f"{PATH}.down_proj": values(EXPERTS, WIDTH, hidden),
        "model.embed_tokens.weight": values(512, hidden),
    }
    return write_checkpoint_dir(root, tensors, {**LLAMA4, "hidden_size": hidden})


def decoded_by_hand(out: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The fused tensors, from an output whose config hides the family from `dequantize`."""
    plain = tmp_path / "plain"
    config = json.loads((out / "config.json").read_text())
    plain.mkdir()
    save_file(read_all(out), plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    nf4_ok("dequantize", plain, tmp_path / "parts")
    parts = read_all(tmp_path / "parts")

    def part(expert: int, name: str) -> torch.Tensor:
        return parts[f"{PATH}.{expert}.{name}.weight"].T

    return {
        "gate_up_proj": torch.stack(
            [torch.cat([part(e, "gate_proj"), part(e, "up_proj")], 1) for e in range(EXPERTS)]
        ),
        "down_proj": torch.stack([part(e, "down_proj") for e in range(EXPERTS)]),
    }


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, ()),
        (torch.bfloat16, ("--keep", f"{PATH}.1.up_proj")),
        (torch.bfloat16, ("--keep", "down_proj")),
        (torch.float32, ("--dtype", "bfloat16", "--keep", f"{PATH}.1.up_proj")),
    ],
)
def test_experts_are_put_together_again(tmp_path, with_manifest, dtype, options):
    """Packed ones and kept ones, in any mixture."""
    source, out, back = (tmp_path / part for part in ("src", "out", "back"))
    llama4(source, dtype)
    nf4_ok("quantize", source, out, "-q", *options)
    if not with_manifest:
        (out / "nf4_manifest.json").unlink()
    nf4_ok("dequantize", out, back)
    given, found = read_all(source), read_all(back)
    assert found.keys() == given.keys()
    for name, expected in decoded_by_hand(out, tmp_path).items():
        tensor = found[f"{PATH}.{name}"]
        assert tensor.shape == given[f"{PATH}.{name}"].shape
        assert torch.equal(tensor, expected.to(tensor.dtype))
        assert far(given[f"{PATH}.{name}"], tensor) < 0.12


def test_experts_of_several_files_and_chunks(tmp_path):
    """Every shard holds a part of a layer, and a worker decodes a few rows at a time."""
    source, out = llama4(tmp_path / "src", hidden=8192), tmp_path / "out"
    nf4_ok("quantize", source, out, "-q", "--max-shard-size", "1MB")
    assert len(list(out.glob("*.safetensors"))) > 1
    nf4_ok("dequantize", out, tmp_path / "a", "--max-shard-size", "1MB")
    engine = engines.load("cpu")
    write_decoded(plan_decoding(out, engine), tmp_path / "b", engine, Resources(3, 1 << 17, 0))
    model = plan_decoding(out, engine, max_shard_size=1_000_000)
    write_decoded(model, tmp_path / "c", engine, Resources(1, 1 << 20, 0), cluster=Elsewhere())
    assert same_files(tmp_path / "a", tmp_path / "c")
    a, b, given = (read_all(p) for p in (tmp_path / "a", tmp_path / "b", source))
    assert a.keys() == b.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(a[name], b[name])
        assert far(tensor, a[name]) < 0.12


def test_a_source_with_a_matrix_for_each_expert_gets_them_back(tmp_path):
    """Its manifest records that no fused tensor was there."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PATH}.{e}.{part}.weight": torch.randn(*shape, generator=generator).bfloat16()
        for e in range(EXPERTS)
        for part, shape in (("gate_proj", (40, H)), ("up_proj", (40, H)), ("down_proj", (H, 40)))
    }
    source = write_checkpoint_dir(tmp_path / "src", tensors, LLAMA4)
    nf4_ok("quantize", source, tmp_path / "out", "-q")
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back")
    assert read_all(tmp_path / "back").keys() == tensors.keys()


@pytest.mark.parametrize("lost", [f"{PATH}.1.up_proj", f"{PATH}.2."])
def test_incomplete_experts_are_refused(tmp_path, lost):
    out = tmp_path / "out"
    nf4_ok("quantize", llama4(tmp_path / "src"), out, "-q")
    (out / "nf4_manifest.json").unlink()
    tensors = {k: t for k, t in read_all(out).items() if not k.startswith(lost)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    refused(INPUT, "dequantize", "out", "back", says=("is missing", "is made of"), cwd=tmp_path)


def test_a_fused_tensor_beside_its_experts_is_refused(tmp_path):
    out = tmp_path / "out"
    nf4_ok("quantize", llama4(tmp_path / "src"), out, "-q")
    tensors = {**read_all(out), f"{PATH}.down_proj": torch.zeros(EXPERTS, WIDTH, H)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    refused(INPUT, "dequantize", "out", "back", says=("one or the other",), cwd=tmp_path)


def test_experts_of_different_shapes_make_no_tensor():
    shapes = {f"{PATH}.{e}.down_proj.weight": (64, 40 + e) for e in range(2)}
    with pytest.raises(InputError, match="has shape"):
        regions({"model_type": "llama4_text"}, shapes, "here")


@pytest.mark.loaders
@pytest.mark.parametrize("name", ["llama4_text", "qwen3_moe"])
def test_a_model_with_fused_experts_is_evaluated(tmp_path, name):
    text_models.make(name, tmp_path / "src", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text_models.text(900))
    nf4_ok("quantize", "src", "out", "-q", "--target", "unsloth", cwd=tmp_path)
    said = nf4_ok(
        "eval", "out", "--source", "src", "--text", "text.txt", "--context", "32",
        "--tokens", "512", "--json", "-q", "--cache-dir", "cache", cwd=tmp_path,
    )  # fmt: skip
    figures = json.loads(said)["texts"]["text"]
    assert figures["top1"][0] > 0.5, "random experts agree on one token in a hundred"
