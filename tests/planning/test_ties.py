"""Tied layers that the files do not have, and what a model holds in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import OF_LOADERS, command
from helpers import LLAMA, llama_tensors, nf4_ok, read_all, write_checkpoint_dir
from tiny_models import ENCODER, VISION

from nf4cli.planning import ties
from nf4cli.planning.answer import Answer
from nf4cli.planning.skip_list import Names

GIVEN = os.environ.get("NF4_TRANSFORMERS4_PYTHON")
SECOND = Path(GIVEN or Path(__file__).parents[2] / ".venv-transformers4" / "bin" / "python")
H, V = 64, 512

WITHOUT_STATE = """
import json, os, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
import bitsandbytes as bnb, transformers
transformers.utils.logging.set_verbosity_error()
found = {}
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, name).from_pretrained(path)
    packed = [(p, m) for p, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    lacking = [p for p, m in packed if getattr(m.weight, "quant_state", None) is None]
    found[path] = [len(packed) - len(lacking), lacking]
print(json.dumps(found))
"""
"""Class and path of models -> how many layers have packed weights, which layers lack them."""


def bark(t: Any) -> Any:
    part = {
        "num_layers": 2, "num_heads": 4, "hidden_size": H, "block_size": 64,
        "input_vocab_size": 200, "output_vocab_size": 200,
    }  # fmt: skip
    fine = {**part, "n_codes_total": 8, "n_codes_given": 1}
    return t.BarkModel(
        t.BarkConfig(semantic_config=part, coarse_acoustics_config=part, fine_acoustics_config=fine)
    )


def git(t: Any) -> Any:
    vision = {**VISION, "num_hidden_layers": 1}
    config = t.GitConfig(**ENCODER, tie_word_embeddings=True, vision_config=vision)
    return t.GitForCausalLM(config)


def rwkv(t: Any) -> Any:
    return t.RwkvForCausalLM(
        t.RwkvConfig(
            vocab_size=V, hidden_size=H, attention_hidden_size=H, num_hidden_layers=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def electra(t: Any) -> Any:
    return t.ElectraForMaskedLM(
        t.ElectraConfig(**ENCODER, embedding_size=H, tie_word_embeddings=True)
    )


def convbert(t: Any) -> Any:
    return t.ConvBertForMaskedLM(
        t.ConvBertConfig(**ENCODER, embedding_size=H, tie_word_embeddings=True)
    )


def detr(t: Any, **options: bool) -> Any:
    backbone = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return t.DeformableDetrForObjectDetection(
        t.DeformableDetrConfig(
            d_model=H, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=H, decoder_ffn_dim=H, num_queries=8,
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=backbone, **options,
        )
    )  # fmt: skip


def refining_detr(t: Any) -> Any:
    return detr(t, with_box_refine=True, two_stage=True)


TIED: tuple[Callable[[Any], Any], ...] = (bark, git, rwkv, electra, convbert, detr, refining_detr)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Name -> (class, 4-bit output) of models with tied layers."""
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    found = {}
    for make in TIED:
        root = tmp_path_factory.mktemp(make.__name__)
        torch.manual_seed(0)
        model = make(transformers)
        model.save_pretrained(root / "src")
        nf4_ok("quantize", root / "src", root / "out", "-q")
        assert "is good" in nf4_ok("verify", root / "out", "--source", root / "src")
        found[make.__name__] = type(model).__name__, root / "out"
    return found


@pytest.mark.loaders
@pytest.mark.parametrize(
    "python",
    [
        pytest.param(Path(sys.executable), id="5"),
        pytest.param(
            SECOND, id="4",
            marks=pytest.mark.skipif(
                not SECOND.exists(), reason="no environment with transformers 4"
            ),
        ),
    ],
)  # fmt: skip
def test_every_4bit_layer_of_a_model_with_ties_has_a_weight(outputs, python):
    cases = [part for case in outputs.values() for part in map(str, case)]
    done = subprocess.run(
        [*command(python, OF_LOADERS), "-c", WITHOUT_STATE, *cases],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (_, path) in outputs.items():
        packed, lacking = found[str(path)]
        assert lacking == [], name
        assert packed > 0, name


def skip_list(out: Path) -> list[str]:
    config = json.loads((out / "config.json").read_text())
    keys: list[str] = config["quantization_config"]["llm_int8_skip_modules"]
    return keys


def test_tied_layers_are_in_the_skip_list(tmp_path):
    """Without transformers: the names come from the survey."""
    tensors = {
        "electra.embeddings.word_embeddings.weight": torch.zeros(512, 64),
        "electra.encoder.layer.0.output.dense.weight": torch.ones(64, 64),
    }
    config = {"model_type": "electra", "vocab_size": 512, "architectures": ["ElectraForMaskedLM"]}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config)
    nf4_ok("quantize", source, tmp_path / "tied", "-q")
    assert "generator_lm_head" in skip_list(tmp_path / "tied")
    config["architectures"] = ["ElectraForPreTraining"]  # which has no such layer
    write_checkpoint_dir(tmp_path / "src", tensors, config)
    nf4_ok("quantize", source, tmp_path / "other", "-q")
    assert "generator_lm_head" not in skip_list(tmp_path / "other")
    del config["architectures"]  # nobody can tell
    write_checkpoint_dir(tmp_path / "src", tensors, config)
    nf4_ok("quantize", source, tmp_path / "unknown", "-q")
    assert "generator_lm_head" in skip_list(tmp_path / "unknown")


def test_a_head_that_the_list_names_already_is_not_added(tmp_path):
    tensors = {n: t for n, t in llama_tensors().items() if n != "lm_head.weight"}
    config = {**LLAMA, "tie_word_embeddings": True}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config)
    nf4_ok("quantize", source, tmp_path / "out", "-q")
    assert skip_list(tmp_path / "out").count("lm_head") == 1
    assert ties.absent_tied(config, None, tensors, Names("model")) == ["lm_head"]


@pytest.mark.parametrize("tied", [False, True, None])
def test_a_head_that_nobody_has_is_noted(tmp_path, tied):
    tensors = {n: t for n, t in llama_tensors().items() if n != "lm_head.weight"}
    config = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config)
    said = nf4_ok("quantize", source, tmp_path / "out", "--plan")
    assert ("with random numbers" in " ".join(said.split())) is (tied is False)


def test_a_layer_with_a_weight_is_not_absent():
    config = {
        "model_type": "deformable_detr",
        "architectures": ["DeformableDetrForObjectDetection"],
    }
    one, two = ([f"class_embed.{i}.weight" for i in range(n)] for n in (1, 2))
    assert "class_embed.*" in ties.absent_tied(config, None, one, Names("model"))
    assert "class_embed.*" not in ties.absent_tied(config, None, two, Names("model"))
    answer = Answer("5", frozenset(), frozenset(), tied=frozenset({"a.head"}))
    assert ties.absent_tied({}, answer, ["b.weight"], Names("")) == ["a.head"]
    assert ties.absent_tied({}, answer, ["a.head.weight"], Names("")) == []


# -- float32 ------------------------------------------------------------------------------------


def with_router(root: Path, dtype: torch.dtype) -> Path:
    tensors = {
        **llama_tensors(),
        "model.layers.1.mlp.gate.weight": torch.randn(4, 64).to(dtype),
        "model.layers.1.mlp.moe_statics.e_score_correction_bias": torch.randn(1, 4),
    }
    return write_checkpoint_dir(root, tensors, {**LLAMA, "model_type": "ernie4_5_moe"})


def test_a_router_that_transformers_holds_in_float32_keeps_its_bits(tmp_path):
    source = with_router(tmp_path / "src", torch.float32)
    said = nf4_ok("quantize", source, tmp_path / "out")
    gate = "model.layers.1.mlp.gate.weight"
    assert f"{gate} stays in float32, as in the source" in said
    assert torch.equal(read_all(tmp_path / "out")[gate], read_all(source)[gate])
    manifest = json.loads((tmp_path / "out" / "nf4_manifest.json").read_text())
    assert manifest["tensors"][gate]["action"] == "copy"
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_a_router_in_16_bit_stays_as_it_is(tmp_path):
    source = with_router(tmp_path / "src", torch.bfloat16)
    said = nf4_ok("quantize", source, tmp_path / "out")
    gate = "model.layers.1.mlp.gate.weight"
    assert "stays in float32" not in said
    assert torch.equal(read_all(tmp_path / "out")[gate], read_all(source)[gate])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_float32_in_float16_alone(tmp_path, dtype):
    """transformers 5 holds T5's wo in bfloat16 where the model is."""
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    tensors = {
        "shared.weight": torch.randn(512, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": torch.randn(128, 64),
        wo: torch.randn(64, 128),
    }
    config = {"model_type": "t5", "vocab_size": 512, "d_model": 64, "dtype": "float32"}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config)
    nf4_ok("quantize", source, tmp_path / "out", "--dtype", dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert read_all(tmp_path / "out")[wo].dtype == expected
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


@pytest.mark.loaders
def test_float32_modules_are_loaded_as_from_the_source(tmp_path):
    """Ernie's routers: their values are those that from_pretrained takes from the source."""
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=V, hidden_size=H, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, moe_num_experts=4, moe_k=2,
        moe_intermediate_size=64, moe_layer_start_index=1, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.Ernie4_5_MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "src")
    document = json.loads((tmp_path / "src" / "config.json").read_text())
    document["dtype"] = "bfloat16"
    (tmp_path / "src" / "config.json").write_text(json.dumps(document))
    nf4_ok("quantize", tmp_path / "src", tmp_path / "out", "-q")
    loaded, real = (
        type(model).from_pretrained(tmp_path / part, dtype="auto").state_dict()
        for part in ("out", "src")
    )
    gates = [name for name in real if name.endswith("mlp.gate.weight")]
    assert gates
    for name in gates:
        assert loaded[name].dtype == real[name].dtype == torch.float32
        assert torch.equal(loaded[name], real[name])
    with torch.no_grad():
        ids = torch.arange(5, 13)[None]
        whole = type(model).from_pretrained(tmp_path / "out", dtype="auto")
        for module in whole.modules():
            module.support_avx512bf16_for_cpu = False
        assert whole(input_ids=ids).logits.isfinite().all()


def test_what_transformers_answers_of_float32_is_kept():
    answer = Answer("5", frozenset(), frozenset(), float32=frozenset({"a.gate.weight"}))
    for dtype, kept in (("BF16", True), ("F16", True), ("F32", False)):
        assert ties.float32_test({}, answer, dtype, Names(""))("a.gate.weight") is kept
        assert not ties.float32_test({}, answer, dtype, Names(""))("a.up.weight")
