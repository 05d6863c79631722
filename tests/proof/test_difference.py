"""nf4 diff: against sums that are made here, weight by weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import INPUT, LLAMA, nf4, nf4_ok, read_all, refused, write_checkpoint_dir
from safetensors.torch import save_file
from schemas import document

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def differ(a: object, b: object) -> dict:
    """The document of a run that finds a difference."""
    done = nf4("diff", a, b, "--json")
    assert done.returncode == 1, done.stderr
    return document(done.stdout, "diff")


def changed(root: Path, place: Path, change) -> Path:
    """A copy of a checkpoint whose tensors are changed."""
    shutil.copytree(root, place)
    tensors = {k: t.clone() for k, t in read_all(root).items()}
    change(tensors)
    for file in place.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def test_no_difference(llama, llama_nf4):
    for path in (llama, llama_nf4):
        found = document(nf4_ok("diff", path, path, "--json"), "diff")
        assert found["equal"]
        assert found["tensors"] == found["config"] == []
    assert "no difference" in nf4_ok("diff", llama_nf4, llama_nf4)


def test_what_four_bits_change(llama, llama_nf4, tmp_path):
    """The error of each packed weight is what the decoded weights say, and the manifest nearly."""
    found = differ(llama, llama_nf4)
    nf4_ok("dequantize", llama_nf4, tmp_path / "back", "--dtype", "float32")
    source, back = read_all(llama), read_all(tmp_path / "back")
    errors = json.loads((llama_nf4 / "nf4_manifest.json").read_text())["tensors"]
    packed = {name for name, record in errors.items() if record["action"] == "quantize"}
    assert {t["name"] for t in found["tensors"]} == packed
    for tensor in found["tensors"]:
        a, b = source[tensor["name"]].double(), back[tensor["name"]].double()
        assert tensor["kind"] == "values"
        assert tensor["changed"] == int((a != b).sum())
        assert tensor["rel_rmse"] == pytest.approx(float((a - b).norm() / a.norm()))
        assert tensor["max_abs"] == pytest.approx(float((a - b).abs().max()))
        assert tensor["rel_rmse"] == pytest.approx(
            errors[tensor["name"]]["error"]["rel_rmse"], rel=0.01
        )
        assert tensor["codes_changed"] is None
    assert [c["key"] for c in found["config"]] == ["quantization_config"]


def test_one_code(llama_nf4, tmp_path):
    def flip(tensors):
        tensors[UP][100] ^= 0x30

    found = differ(llama_nf4, changed(llama_nf4, tmp_path / "b", flip))
    (tensor,) = found["tensors"]
    assert (tensor["name"], tensor["kind"]) == (UP, "values")
    assert (tensor["codes_changed"], tensor["changed"]) == (1, 1)
    assert found["same"] == len({k for k in read_all(llama_nf4) if k.endswith(".weight")}) - 1


def test_another_recipe(llama, llama_nf4, tmp_path):
    nf4_ok("quantize", llama, tmp_path / "b", "--blocksize", "128", "-q")
    for tensor in differ(llama_nf4, tmp_path / "b")["tensors"]:
        assert "blocksize 64" in tensor["a"]
        assert "blocksize 128" in tensor["b"]
        assert 0 < tensor["codes_changed"] <= tensor["elements"]
        assert 0 < tensor["rel_rmse"] < 0.2


@pytest.mark.parametrize(
    ("change", "kind", "facts"),
    [
        (lambda t: t.update({NORM: t[NORM].float()}), "storage", {"changed": 0, "rel_rmse": 0}),
        (lambda t: t.update({NORM: t[NORM].double()}), "storage", {"changed": 0}),
        (lambda t: t.pop(NORM), "only in A", {"b": "", "shape_b": None, "changed": None}),
        (lambda t: t.update(extra=torch.ones(3)), "only in B", {"a": "", "elements": 3}),
        (lambda t: t.update({NORM: t[NORM][:7].clone()}), "shape", {"shape_b": [7]}),
        (lambda t: t[NORM].fill_(torch.nan), "values", {"rel_rmse": None, "max_abs": None}),
        (lambda t: t[NORM][:3].add_(1), "values", {"changed": 3, "max_abs": 1}),
    ],
)
def test_kinds(llama, tmp_path, change, kind, facts):
    (tensor,) = differ(llama, changed(llama, tmp_path / "b", change))["tensors"]
    assert tensor["kind"] == kind
    assert {name: tensor[name] for name in facts} == facts


def test_tensors_that_are_no_floats(tmp_path):
    config = {**LLAMA, "rope": [1.0, float("inf")]}
    a = write_checkpoint_dir(tmp_path / "a", {"ids": torch.arange(100)}, config)
    b = write_checkpoint_dir(tmp_path / "b", {"ids": torch.arange(100).flip(0)}, {**LLAMA})
    found = differ(a, b)
    assert found["tensors"][0]["changed"] == 100
    assert found["config"] == [{"key": "rope", "a": "[1.0, Infinity]", "b": None}]


def test_in_words(llama, llama_nf4):
    done = nf4("diff", llama, llama_nf4)
    for words in (
        "they differ",
        UP,
        "weights: BF16 | nf4, blocksize 64, nested, bfloat16",
        "codes",
    ):
        assert words in done.stdout
    assert nf4("diff", llama, llama_nf4, "--quiet").stdout == ""


def test_pipelines(pipe, tmp_path):
    nf4_ok("quantize", pipe, tmp_path / "out", "-q")
    found = differ(pipe, tmp_path / "out")
    assert {name for name, part in found["components"].items() if part["tensors"]}
    assert found["only_a"] == found["only_b"] == []
    part = next(name for name, part in found["components"].items() if part["tensors"])
    refused(INPUT, "diff", pipe, f"out/{part}", says=("one is a pipeline",), cwd=tmp_path)


def test_bad_input(llama, tmp_path):
    refused(INPUT, "diff", llama, "missing", says=("missing",), cwd=tmp_path)
    (tmp_path / "x").mkdir()
    refused(INPUT, "diff", llama, "x", says=("safetensors",), cwd=tmp_path)
