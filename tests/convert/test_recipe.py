"""nf4 quantize --recipe: each module has the format that it says, and the proof knows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import LLAMA, llama_tensors, nf4, nf4_ok, read_all, same_files, write_checkpoint_dir

import nf4cli
from nf4cli.checkpoint.discovery import MANIFEST, open_checkpoint
from nf4cli.checkpoint.packed import load_weights
from nf4cli.checkpoint.reader import ShardReaders
from nf4cli.errors import UsageError
from nf4cli.format.config import ModuleFormat, QuantConfig

TEXT = """recipe = 1
[default]
blocksize = 64
double_quant = true
[[format]]
blocksize = 32
double_quant = true
modules = ["*.v_proj", "model.layers.0.mlp.down_proj"]
[[format]]
blocksize = 128
double_quant = false
modules = ["layers.1.mlp"]
[keep]
modules = ["layers.1.self_attn.k_proj"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A `model`, its `recipe.toml` and its output `out`; never changed by a test."""
    root = tmp_path_factory.mktemp("recipe")
    write_checkpoint_dir(root / "model", llama_tensors(), LLAMA)
    (root / "recipe.toml").write_text(TEXT)
    nf4_ok("quantize", "model", "out", "--recipe", "recipe.toml", cwd=root)
    return root


def packings(directory) -> dict[str, tuple[int, bool]]:
    """(blocksize, double_quant) by the module's path behind `model.layers.`."""
    checkpoint = open_checkpoint(directory)
    with ShardReaders(checkpoint.shards) as readers:
        weights = load_weights(checkpoint, readers)
    return {
        name.removeprefix("model.layers.").removesuffix(".weight"): (
            weight.state.blocksize, weight.state.nested,
        )
        for name, weight in weights.items()
    }  # fmt: skip


def test_each_module_has_its_own_format(place):
    found = packings(place / "out")
    assert found["0.self_attn.v_proj"] == found["1.self_attn.v_proj"] == (32, True)
    assert found["0.mlp.down_proj"] == (32, True)
    assert {found[f"1.mlp.{name}_proj"] for name in ("gate", "up", "down")} == {(128, False)}
    assert found["0.self_attn.q_proj"] == found["0.mlp.up_proj"] == (64, True)
    assert "1.self_attn.k_proj" not in found
    assert len(found) == 13


def test_every_weight_is_what_it_is_in_a_model_all_in_its_format(place, tmp_path):
    ours = read_all(place / "out")
    for blocksize, nested, names in (
        (32, True, ["0.self_attn.v_proj", "0.mlp.down_proj"]),
        (64, True, ["0.mlp.up_proj"]),
        (128, False, ["1.mlp.gate_proj"]),
    ):
        config = QuantConfig(blocksize=blocksize, double_quant=nested)
        alike = tmp_path / f"{blocksize}"
        nf4cli.quantize(place / "model", alike, config)
        for key, tensor in read_all(alike).items():
            if any(name in key for name in names):
                assert torch.equal(ours[key], tensor), key


def test_the_proof_knows_the_formats(place, tmp_path):
    nf4_ok("verify", "out", "--source", "model", cwd=place)
    recorded = json.loads((place / "out" / MANIFEST).read_text())["recipe"]
    assert [each["blocksize"] for each in recorded["formats"]] == [32, 128]
    # Without its manifest the formats are those of its states.
    shutil.copytree(place / "out", tmp_path / "foreign")
    (tmp_path / "foreign" / MANIFEST).unlink()
    nf4_ok("verify", tmp_path / "foreign", "--source", place / "model")
    # A manifest that says otherwise is found out.
    shutil.copytree(place / "out", tmp_path / "forged")
    forged = json.loads((tmp_path / "forged" / MANIFEST).read_text())
    forged["recipe"]["formats"][0]["blocksize"] = 64
    (tmp_path / "forged" / MANIFEST).write_text(json.dumps(forged))
    done = nf4("verify", tmp_path / "forged")
    assert done.returncode == 1
    assert "the manifest's recipe says" in done.stdout + done.stderr


def test_decoding_takes_each_state(place, tmp_path):
    nf4_ok("dequantize", place / "out", tmp_path / "back")
    back, source = read_all(tmp_path / "back"), read_all(place / "model")
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        error = (back[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < 0.12, name
    assert torch.equal(
        back["model.layers.1.self_attn.k_proj.weight"],
        source["model.layers.1.self_attn.k_proj.weight"],
    )


def test_chosen_scales_and_threads_do_not_change_that(place, tmp_path):
    for number, options in enumerate([("--workers", "1"), ("--workers", "2", "--engine", "torch")]):
        nf4_ok(
            "quantize", place / "model", tmp_path / f"{number}", "--scale", "search",
            "--recipe", place / "recipe.toml", *options,
        )  # fmt: skip
    assert same_files(tmp_path / "0", tmp_path / "1")
    nf4_ok("verify", tmp_path / "0", "--source", place / "model")


def test_resume_wants_the_same_recipe(place, tmp_path):
    (tmp_path / "other.toml").write_text(TEXT.replace("128", "64"))
    shutil.copytree(place / "out", tmp_path / "out")
    done = nf4(
        "quantize", place / "model", tmp_path / "out", "--resume", "--recipe",
        tmp_path / "other.toml",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    nf4_ok(
        "quantize", place / "model", tmp_path / "out", "--resume", "--recipe", place / "recipe.toml"
    )


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('"*.v_proj"', '"*.w_proj"', "'*.w_proj', which is no module"),
        ('"layers.1.mlp"', '"v_proj"', "several formats"),
        ('"layers.1.mlp"', '"*.v_proj"', "twice"),
        ('"layers.1.mlp"', '"lm_head"', "keeps it in full precision"),
        ('"layers.1.self_attn.k_proj"', '"x_proj"', "matches no module"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(place, tmp_path, before, after, says):
    assert before in TEXT
    (tmp_path / "recipe.toml").write_text(TEXT.replace(before, after))
    done = nf4("quantize", "model", tmp_path / "o", "--recipe", tmp_path / "recipe.toml", cwd=place)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert not (tmp_path / "o").exists()


def test_options_that_the_recipe_decides(place, tmp_path):
    for option in (("--blocksize", "64"), ("--double-quant",), ("--no-double-quant",)):
        done = nf4(
            "quantize", "model", tmp_path / "o", "--recipe", "recipe.toml", *option, cwd=place
        )
        assert done.returncode == 2
        assert "is the recipe's to say" in done.stderr


def test_vllm_wants_one_format_among_experts(tmp_path):
    from nf4cli.planning.vllm_rules import require_loadable

    tensors = {
        f"model.layers.0.mlp.experts.{i}.{name}_proj.weight": torch.randn(64, 64).bfloat16()
        for i in range(2)
        for name in ("gate", "up", "down")
    }
    config = {**LLAMA, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    write_checkpoint_dir(tmp_path / "model", llama_tensors() | tensors, config)
    one = ModuleFormat(32, True, ("experts.0.up_proj",))
    with pytest.raises(UsageError, match="loads all experts of a layer as one"):
        nf4cli.plan(tmp_path / "model", config=QuantConfig(target="vllm", formats=(one,)))
    every = ModuleFormat(32, True, ("experts",))
    plan = nf4cli.plan(tmp_path / "model", config=QuantConfig(target="vllm", formats=(every,)))
    require_loadable(plan.parts[""])


def test_a_manifest_with_formats_that_are_none_is_refused(place, tmp_path):
    for number, formats in enumerate(
        ({}, [{}], [{"blocksize": 33, "double_quant": True, "modules": []}],
         [{"blocksize": 32, "double_quant": 1, "modules": ["a"]}],
         [{"blocksize": 32, "double_quant": True, "modules": [3]}])
    ):  # fmt: skip
        broken = tmp_path / f"{number}"
        shutil.copytree(place / "out", broken)
        manifest = json.loads((broken / MANIFEST).read_text())
        manifest["recipe"]["formats"] = formats
        (broken / MANIFEST).write_text(json.dumps(manifest))
        assert nf4("verify", broken).returncode == 1
