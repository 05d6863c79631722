"""Selection against what transformers really quantizes (tests/goldens/architectures.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.checkpoint.types import Checkpoint, Shard, TensorInfo
from nf4cli.errors import InputError, UsageError
from nf4cli.planning import selection

FACTS = json.loads((Path(__file__).parent.parent / "goldens" / "architectures.json").read_text())
FAMILIES = (
    "llama llama_tied llama_seqcls llama_base qwen2 qwen3 gemma3_text phi3 gpt2 gpt_neo gpt_neox "
    "opt bloom mpt stablelm olmo2 smollm3 bert_mlm bert_base modernbert_mlm distilbert_mlm t5"
).split()


def checkpoint(config: dict, tensors: dict) -> Checkpoint:
    shard = Shard(Path("x.safetensors"), 0, 0, ())
    placed = {n: (shard, TensorInfo(n, d, tuple(s), 0)) for n, (d, s) in tensors.items()}
    return Checkpoint(Path("x"), "x", (shard,), placed, config, False, (), ())


def quantized(name: str) -> set[str]:
    facts = FACTS[name]
    choices = selection.select(checkpoint(facts["config"], facts["source_tensors"]))
    return {n for n, choice in choices.items() if choice.quantize}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_quantizes(name):
    assert quantized(name) == set(FACTS[name]["quantized_by_transformers_5_23"])


@pytest.mark.parametrize("name", ["roberta_cls", "distilbert_cls"])
def test_classification_heads_are_kept(name):
    """transformers 5 quantizes them, transformers 4 does not: kept, they load in both."""
    theirs = set(FACTS[name]["quantized_by_transformers_5_23"])
    assert quantized(name) < theirs
    assert all("classifier" in n for n in theirs - quantized(name))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_and_routers_are_kept(name):
    names = quantized(name)
    assert names == set(FACTS[name]["quantized_by_transformers_5_23"])
    assert not any("experts." in n and "shared" not in n for n in names)


def test_gpt2_weights_are_transposed():
    facts = FACTS["gpt2"]
    choices = selection.select(checkpoint(facts["config"], facts["source_tensors"]))
    assert {n.split(".")[-2] for n, c in choices.items() if c.transposed} == {
        "c_attn", "c_proj", "c_fc",
    }  # fmt: skip
    assert all(c.transposed for c in choices.values() if c.quantize)


def test_every_kept_tensor_has_a_reason():
    for facts in FACTS.values():
        try:
            choices = selection.select(checkpoint(facts["config"], facts["source_tensors"]))
        except InputError:
            continue
        assert all(c.rule.reason and c.rule.name for c in choices.values())


def test_a_layer_as_wide_as_the_vocabulary_is_still_a_layer():
    names = {
        "model.embed_tokens.weight": ("BF16", (64, 32)),
        "model.layers.0.mlp.up_proj.weight": ("BF16", (64, 32)),
        "lm_heads.0.weight": ("BF16", (64, 32)),
    }
    choices = selection.select(checkpoint({"model_type": "llama", "vocab_size": 64}, names))
    assert [n for n, c in choices.items() if c.quantize] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("mlp", "model.layers.0.mlp.up_proj", True),
        ("layers.0", "model.layers.0.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("proj", "model.layers.0.mlp.up_proj", False),
        ("*.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("*proj", "model.layers.0.mlp.up_proj.x", False),
    ],
)
def test_patterns(pattern, path, expected):
    assert selection.matches(pattern, path) == expected


def test_an_unmatched_pattern_is_an_error():
    facts = FACTS["llama"]
    with pytest.raises(UsageError, match=r"'layers\.7' matches no module"):
        selection.select(checkpoint(facts["config"], facts["source_tensors"]), ["layers.7"])


def test_nothing_to_quantize_says_why():
    facts = FACTS["falcon"]
    with pytest.raises(InputError, match="own Linear class"):
        selection.select(checkpoint(facts["config"], facts["source_tensors"]))


@pytest.mark.parametrize("params", [{"vocab_size": 64}, {"vocab_size": -1}, {}])
def test_a_head_in_mistrals_layout_is_kept(tmp_path, params):
    """Beside params.json there is no config.json, and the head is called `output`."""
    tensors = {
        "tok_embeddings.weight": torch.ones(64, 32),
        "layers.0.feed_forward.w1.weight": torch.ones(64, 32),
        "output.weight": torch.ones(64, 32),
    }
    save_file(tensors, tmp_path / "consolidated.safetensors")
    if params:
        (tmp_path / "params.json").write_text(json.dumps({"dim": 32, **params}))
    choices = selection.select(open_checkpoint(tmp_path))
    assert [n for n, c in choices.items() if c.quantize] == ["layers.0.feed_forward.w1.weight"]
    assert choices["output.weight"].rule.name == "vocabulary"


def test_a_vocabulary_in_params_json_is_known_without_an_embedding(tmp_path):
    tensors = {"layers.0.w1.weight": torch.ones(64, 32), "output.weight": torch.ones(48, 32)}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text('{"vocab_size": 48}')
    choices = selection.select(open_checkpoint(tmp_path))
    assert not choices["output.weight"].quantize
