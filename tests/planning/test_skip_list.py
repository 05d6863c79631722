"""The skip list: right under the matchers of transformers 4 and 5 and of vLLM."""

from __future__ import annotations

import json

import pytest
from helpers import INPUT, LLAMA, UP, llama_tensors, nf4_ok, refused, write_checkpoint_dir
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from nf4cli.planning import families, skip_list
from nf4cli.planning.skip_list import Names

LLAVA = Names("model", (("language_model.model", "model.language_model"),
                        ("vision_tower", "model.vision_tower")))  # fmt: skip

NAMES = st.lists(
    st.sampled_from("model layers 0 10 q_proj proj gate gate_proj lm_head".split()),
    min_size=1, max_size=5,
).map(".".join)  # fmt: skip


@given(NAMES, NAMES)
def test_v5_matcher_is_transformers_own(key, module):
    assert skip_list.hits_v5(key, module) == (not should_convert_module(module, [key]))


@pytest.mark.parametrize("names", [Names("model"), Names(""), LLAVA])
@given(kept=st.lists(NAMES, max_size=6), quantized=st.lists(NAMES, min_size=1, max_size=6))
def test_no_entry_of_a_skip_list_means_a_packed_module(names, kept, quantized):
    for key in skip_list.skip_modules(kept, quantized, names):
        for module in quantized:
            for form in names.forms(module):
                assert not skip_list.hits(key, form), (key, form)


KEYS = NAMES | st.sampled_from(
    ["model.layers.(0|10)", r"layers.\d+", "model.[^0]+", "model.1{2}0", "1", "0.", "layers.1"]
)


@given(st.lists(KEYS, max_size=8), st.lists(NAMES, max_size=8))
@pytest.mark.parametrize("matches", [skip_list.hits, skip_list.hits_v4])
def test_an_entry_that_means_a_packed_module_is_found(matches, keys, packed):
    """As comparing each with each, which takes minutes for 100,000 modules."""
    slowly = [
        (module, key)
        for module in packed
        if (key := next((key for key in keys if matches(key, module)), None)) is not None
    ]
    assert [*skip_list.mistaken(keys, packed, matches)] == slowly


def test_a_skip_list_of_the_largest_mixtures_is_compared_at_once():
    experts = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(400)]
    gates = [f"model.layers.{i}.mlp.gate" for i in range(60)]
    comparisons = []

    def matches(key: str, module: str) -> bool:
        comparisons.append(key)
        return skip_list.hits(key, module)

    assert not [*skip_list.mistaken(gates, experts, matches)]
    assert len(comparisons) < 100


@given(st.lists(NAMES, max_size=6), st.lists(NAMES, min_size=1, max_size=6))
def test_what_no_entry_means_is_entangled_with_something(kept, quantized):
    names = Names("model")
    keys = skip_list.skip_modules(kept, quantized, names)
    for module in skip_list.unmeant(kept, keys, names):
        assert skip_list.entangled(module, quantized, names)


def test_a_skip_list_holds_heads_and_both_forms():
    kept = ["model.layers.0.mlp.gate", "model.layers.0.mlp.experts.3.w1"]
    packed = ["model.layers.0.mlp.gate_proj"]
    keys = skip_list.skip_modules(skip_list.collapse(kept, packed), packed, Names("model"))
    assert "lm_head" in keys
    assert "layers.0.mlp.gate" in keys
    assert "model.layers.0.mlp.gate" in keys
    assert "model.layers.0.mlp.experts" in keys


def test_experts_that_are_partly_packed_have_entries_of_their_own():
    packed = ["m.mlp.experts.0.w1", "n.mlp.gate"]
    entries = skip_list.collapse(["m.mlp.experts.1.w1", "n.mlp.experts.1.w1"], packed)
    assert list(entries) == ["m.mlp.experts.1.w1", "n.mlp.experts"]


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("language_model.model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("vision_tower.encoder.layers.10.fc1", "model.vision_tower.encoder.layers.10.fc1"),
    ],
)
def test_modules_have_the_names_that_loaders_give_them(path, form):
    assert form in LLAVA.forms(path)
    numbered = Names("", (("encoder.layer.*.attention.query", "layers.*.attention.q_proj"),))
    found = numbered.forms("encoder.layer.12.attention.query")
    assert "layers.12.attention.q_proj" in found
    assert numbered.forms("encoder.layer.x.attention.query") == ("encoder.layer.x.attention.query",)


def test_what_is_confused_with_a_kept_module_is_kept(tmp_path):
    """transformers 5 takes `lm_head` to mean `pre_lm_head`: without it the head has no entry."""
    tensors = llama_tensors()
    tensors["pre_lm_head.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    source = write_checkpoint_dir(tmp_path / "src", tensors, LLAMA)
    plan = json.loads(nf4_ok("quantize", source, tmp_path / "out", "--plan", "--json"))
    fates = {t["name"]: t for t in plan["tensors"]}
    assert fates["pre_lm_head.weight"]["rule"] == "entangled"
    assert fates["model.layers.0.mlp.up_proj.weight"]["action"] == "quantize"
    assert "lm_head" in plan["skip_modules"]


def test_where_that_leaves_nothing_there_is_nothing_to_quantize(work):
    tensors = llama_tensors()
    pair = {"lm_head.weight": tensors["lm_head.weight"], "pre_lm_head.weight": tensors[UP]}
    write_checkpoint_dir(work / "pair", pair, LLAMA)
    says = ("no linear layer to quantize", "loaders cannot tell its name")
    refused(INPUT, "quantize", "pair", says=says, cwd=work)


def test_the_survey_knows_what_families_call_their_modules():
    names = families.names_of({"model_type": "vit"})
    assert names.base_prefix == "vit"
    assert "vit.layers.3.mlp.fc1" in names.forms("vit.encoder.layer.3.intermediate.dense")
    assert families.names_of({"model_type": "bert"}).base_prefix == "bert"
    assert families.names_of({"model_type": "nobody"}) == Names("model")
